"""A run with NaN stops, names the module, and keeps good checkpoints. Oracle: the module into which the test wrote NaN."""

import re

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.callbacks import FiniteCheck, finite
from qat.losses import LossTerm
from tests.callbacks.fitting import QUIET, added, differing, module, net
from tests.callbacks.fitting import fit as fit_net
from tests.conftest import results, tiny, train
from tests.processes import in_processes
from tests.tiny import identical


class Poison(Callback):
    """Calls `spoil(net)` once, after the optimizer step that makes the step count `step` (0 = before the first)."""

    def __init__(self, step, spoil):
        self.step, self.spoil = step, spoil

    def on_train_start(self, trainer, pl_module):
        if self.step == 0:
            self.spoil(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            self.spoil(pl_module.net)


def damage(net):
    """One weight in the middle of the net."""
    with torch.no_grad():
        net.blocks[0].mlp.fc1.weight[0, 0] = torch.nan


class SpoiledNet(Poison):
    """For configs."""

    def __init__(self, step):
        super().__init__(step, damage)


def overflow(net):
    """A layer without parameters whose output is infinite from now on."""
    net.blocks[0].mlp.act.register_forward_hook(lambda module, args, output: output / 0)


class Small(LightningModule):
    """Two layers on three numbers; the loss can be spoiled."""

    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 1))
        self.factor = factor

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean() * self.factor

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module, *callbacks, images=None, steps=10, plugins=None, checked=True):
    """Ten steps of two images each; an epoch is ten steps."""
    images = torch.ones(2 * steps, 3) if images is None else images
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=2)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        plugins=plugins,
        callbacks=[*([FiniteCheck(every_n_steps=4)] if checked else []), *callbacks],
        **QUIET,
    )
    trainer.fit(module, loader)
    return trainer


def stopped(module, *callbacks, **settings):
    with pytest.raises(qat.UsageError) as error:
        fit(module, *callbacks, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def spoil_first_layer(net):
    with torch.no_grad():
        net[0].weight[1, 2] = torch.inf


def test_a_healthy_run_is_left_as_it_is():
    watched, alone = Small(), Small()
    assert fit(watched).global_step == 10
    fit(alone, checked=False)
    assert differing(watched.state_dict(), alone.state_dict()) == []


def images_with_nan():
    images = torch.ones(20, 3)
    images[7, 0] = torch.nan
    return images


def spoil_activation(net):
    net[1].register_forward_hook(lambda module, args, output: output * torch.nan)


class SpoilGradient(Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 3:
            pl_module.net[0].weight.grad[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("callback", "settings", "first"),
    [
        (Poison(3, spoil_first_layer), {}, "0.weight"),
        (Poison(3, spoil_activation), {}, r"the output of 1 \(Identity\)"),
        (SpoilGradient(), {}, r"the loss or its gradient \(the outputs of the model are finite\)"),
        (Callback(), {"images": images_with_nan()}, "the images of the batch"),
    ],
    ids=["weight", "activation", "gradient", "images"],
)
def test_where_looking_is_free_the_step_is_not_taken(callback, settings, first):
    module, before = Small(), []
    look = FiniteCheck._raise_if_bad

    class Watch(FiniteCheck):
        def _raise_if_bad(self, trainer):
            before[:] = [p.detach().clone() for p in module.parameters()]
            look(self, trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "FiniteCheck", Watch)
        message = stopped(module, callback, **settings)
    what = "training stopped: the loss or a gradient of training step 3 is not finite"
    expected = rf"{what}; first non-finite: {first}; any saved checkpoint is from an earlier step; a lower "
    assert re.match(expected, message)
    assert identical(module.parameters(), before)


def test_steps_that_a_gradient_scaler_skips_are_no_error():
    # At this scale gradients overflow until the scaler has halved it often enough.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    seen = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(bool(pl_module.net[0].weight.grad.isfinite().all()))

    fit(Small(), Watch(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], steps=30)
    assert (seen[0], seen[-1]) == (False, True)


class SickProcess(LossTerm):
    """A constant that is NaN in one process, in its second step: gradients are finite everywhere."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, step):
        self.steps += 1
        return torch.tensor(torch.nan if dist.get_rank() == 1 and self.steps == 2 else 0.0)


def train_in_a_process():
    learner = module(net(), terms={"sick": SickProcess()})
    settings = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "limit_train_batches": 2}
    fit_net(learner, FiniteCheck(), **settings)


@pytest.mark.long
def test_a_loss_of_one_process_ends_all_of_them():
    for error in in_processes(2, train_in_a_process):
        assert "training step 1 is not finite; first non-finite: the loss " in error


# --- in runs of the command

SIX = ("trainer.limit_train_batches=6", "checkpoint.every_n_steps=2")


def poisoned(refused, run_dir, poison, *overrides):
    with added(poison):
        return refused(tiny(run_dir, *SIX, *overrides))


def checkpoints(run_dir):
    """Step of each checkpoint, all of them finite."""
    found = {}
    for path in (run_dir / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        assert all(
            value.isfinite().all()
            for value in content["state_dict"].values()
            if value.is_floating_point()
        ), path
        found[path.name] = content["global_step"]
    return found


@pytest.mark.sample(1)
@pytest.mark.parametrize("is_late", [False, True])
def test_damaged_weights_reach_no_file_and_the_run_goes_on_from_the_last_good_one(
    tmp_path, monkeypatch, refused, is_late
):
    monkeypatch.setattr(finite, "_reads_without_waiting", lambda module: not is_late)
    run = tmp_path / "run"
    message = poisoned(refused, run, Poison(3, damage))
    assert (
        "training stopped: the loss or a gradient of training step 3 is not finite; first non-finite: "
        in message
    )
    assert is_late or "first non-finite: blocks.0.mlp.fc1.weight; " in message
    assert checkpoints(run) == {"last.ckpt": 2}
    train(run, *SIX, "resume=true")
    assert checkpoints(run)["last.ckpt"] == 6
    assert "error" not in results(run)


@pytest.mark.parametrize("quant", ["fp", "ofq_2bit"])
def test_the_layer_that_overflows_is_named(tmp_path, refused, quant):
    """After a quantizer an infinity is the highest code: the loss is finite, its gradient is not."""
    message = poisoned(refused, tmp_path / "run", Poison(3, overflow), f"quant={quant}")
    assert (
        "step 3 is not finite; first non-finite: the output of blocks.0.mlp.act (GELU)" in message
    )
    assert "error" in results(tmp_path / "run")
