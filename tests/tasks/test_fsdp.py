"""Runs whose processes share the weights. Oracle: the same run in one process, with the same global batch."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

import qat
from qat.callbacks import finite
from qat.data import Digits
from qat.errors import UsageError
from qat.launch import ranks
from qat.lit.strategies import local_part
from qat.tasks.train import train
from tests.callbacks.fitting import added
from tests.conftest import compose
from tests.errors import usage_error
from tests.processes import in_processes
from tests.tasks.test_processes import KilledError, farthest, leaves, with_images
from tests.tasks.test_resume import last

# W2A2 with QKR; momentum and clipping, so that moments and the norm of all gradients are shared out too.
SETTINGS = (
    "model.args.embed_dim=24",
    "model.args.depth=1",
    "scheduler.warmup_epochs=0",
    "quant=ofq_2bit",
    "logger=[]",
    "optimizer.opt=sgd",
    "optimizer.lr=0.03",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=2",
    "trainer.gradient_clip_val=0.5",
    "data.calibration_images=64",
    "checkpoint.every_n_steps=3",
)
TWO = ("trainer=fsdp", "trainer.accelerator=cpu", "data.batch_size=60", *SETTINGS)
# Two processes have 61 and 60 images to validate: two batches and one.
odd = with_images(val=121)


class Act(Callback):
    """Kills a run before a step; in the second process damages a weight before one, or a gradient of the second step."""

    def __init__(self, folder, kill=None, weight=None, gradient=False):
        self.folder, self.kill, self.weight, self.gradient = folder, kill, weight, gradient

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.kill:
            raise KilledError
        if trainer.global_step == self.weight and trainer.global_rank == 1:
            pl_module.net.get_parameter("blocks.0.mlp.fc1.weight").detach().to_local()[0, 0] = (
                torch.nan
            )

    def on_after_backward(self, trainer, pl_module):
        if self.gradient and trainer.global_step == 1 and trainer.global_rank == 1:
            local_part(pl_module.net.get_parameter("blocks.0.mlp.fc1.weight").grad)[-1, 0] = (
                torch.nan
            )

    @torch.no_grad()
    def on_train_end(self, trainer, pl_module):
        weights = dict(pl_module.net.named_parameters())
        images = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
        parts = {
            name: value.to_local().numel() / value.numel()
            for name, value in weights.items()
            if isinstance(value, DTensor)
        }
        noted = {
            "images": images,
            "logits": pl_module.net.eval()(images),
            "parts": parts,
            "count": len(weights),
        }
        torch.save(noted, self.folder / f"end-{trainer.global_rank}.pt")


def run(folder, *overrides, **what):
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, added(Act(folder, **what)):
        patch.setattr(Digits, "read", odd)
        train(compose("train", f"run_dir={folder}", *overrides))


def runs(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            finite, "_reads_without_waiting", lambda module: False
        )  # as on an accelerator, where nobody waits for a flag
        run(root / "whole", *TWO)
    with pytest.raises(KilledError):
        run(root / "again", *TWO, kill=3)
    run(root / "again", *TWO, "resume=true")
    for name, damage in (("gradient", {"gradient": True}), ("weight", {"weight": 2})):
        with pytest.raises(UsageError) as stopped:
            run(root / name, *TWO, **damage)
        (root / f"{name}-{ranks.rank()}.txt").write_text(str(stopped.value))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fsdp")
    run(root / "one", "data.batch_size=120", *SETTINGS)
    assert in_processes(2, runs, root) == [""] * 2
    return root


@pytest.mark.long
def test_two_processes_equal_one(root):
    found, alone = last(root / "whole"), last(root / "one")
    assert farthest(found["state_dict"], alone["state_dict"]) <= 1e-5
    assert farthest(leaves(found["optimizer_states"]), leaves(alone["optimizer_states"])) <= 1e-5
    first, second = (
        torch.load(root / "whole" / f"end-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert len(first["parts"]) == first["count"]  # no parameter is whole in a process
    assert all(part + second["parts"][name] == 1 for name, part in first["parts"].items())
    assert 0.4 < first["parts"]["blocks.0.mlp.fc1.weight"] < 0.6


@pytest.mark.long
def test_the_file_is_that_of_one_process(root):
    found, alone = last(root / "whole"), last(root / "one")
    assert found.keys() == alone.keys()
    assert list(found["state_dict"]) == list(alone["state_dict"])
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert {name: value.shape for name, value in leaves(found[part]).items()} == {
            name: value.shape for name, value in leaves(alone[part]).items()
        }
    noted = torch.load(root / "whole" / "end-0.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(
            qat.load(f"{root}/whole/checkpoints/last.ckpt")(noted["images"]), noted["logits"]
        )


@pytest.mark.long
def test_a_run_that_is_killed_equals_one_that_was_never_stopped(root):
    found, whole = last(root / "again"), last(root / "whole")
    for part in ("state_dict", "optimizer_states"):
        expected, values = leaves(whole[part]), leaves(found[part])
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[name], value) for name, value in expected.items())


@pytest.mark.long
def test_a_fault_in_the_part_of_one_process_is_found_by_all(root):
    gradient = "the loss or a gradient of training step 1 is not finite; first non-finite: the loss or its gradient"
    weight = "the loss or a gradient of training step 2 is not finite; first non-finite: blocks.0.mlp.fc1.weight"
    for rank in (0, 1):
        assert (
            (root / f"gradient-{rank}.txt").read_text().startswith(f"training stopped: {gradient}")
        )
        assert (root / f"weight-{rank}.txt").read_text().startswith(f"training stopped: {weight}; ")


FSDP = r"trainer\.strategy='fsdp'"
ALLOWED = "needs unsharded weights; must be ddp$"


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("setting", "line"),
    [
        *(
            (f"callbacks=[default,{name}]", f"{FSDP}: callbacks.{name} {ALLOWED}")
            for name in ("cga", "freeze", "oscillation", "ema")
        ),
        ("loss=ce_dampening", f"{FSDP}: the loss term dampening {ALLOWED}"),
        ("loss.kure=1", f"{FSDP}: the loss term kure {ALLOWED}"),
        ("compile=true", f"compile=true: {FSDP} .*; must be false$"),
        ("compile=graphs", f"compile=graphs: {FSDP} .*; must be false$"),
        (
            "trainer.precision=16-mixed",
            rf"trainer\.precision='16-mixed': {FSDP} .*; must be 32-true or bf16-mixed$",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, setting, line):
    with usage_error(f"^{line}"):
        train(compose("train", f"run_dir={tmp_path}", *TWO[:2], setting))
