"""A run that turns into NaN stops, names the place, and leaves good checkpoints. Oracle: where the test put the NaN."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.callbacks import FaultGuard, finite
from qat.callbacks.fault_cause import find_cause
from qat.tasks import fit as parts
from tests.conftest import results, tiny, train


class Poison(Callback):
    """Calls `spoil(net)` once, behind the optimizer step that makes the step count `step` (0 = in front of the first)."""

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


def fit(module, *callbacks, images=None, steps=10, every=4, plugins=None):
    """Ten steps of two images each; an epoch is ten steps."""
    images = torch.ones(2 * steps, 3) if images is None else images
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=2)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        plugins=plugins,
        callbacks=[FaultGuard(every_n_steps=every), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
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


@pytest.fixture
def late(monkeypatch):
    """As on an accelerator: no look at the loss is free."""
    monkeypatch.setattr(finite, "_is_free", lambda tensor: False)


def test_a_healthy_run_is_left_alone():
    assert fit(Small()).global_step == 10


def test_the_first_images_are_looked_at_before_anything_is_done():
    images = torch.ones(20, 3)
    images[1, 0] = torch.nan
    module = Small()
    before = module.net[0].weight.clone()
    assert stopped(module, images=images) == "data: the images of the first batch hold NaN or infinity, step 0 was not taken"
    assert torch.equal(module.net[0].weight, before)


def test_the_first_loss_is_looked_at_before_the_first_update(late):
    module = Small(factor=torch.nan)
    before = module.net[0].weight.clone()
    message = stopped(module)
    assert message.startswith(
        "training stopped: the loss of step 0 is nan; first not finite: the loss or its gradient (the net's outputs are finite); no step"
    )
    assert torch.equal(module.net[0].weight, before)


def test_later_images_are_blamed_for_what_they_do():
    images = torch.ones(20, 3)
    images[7, 0] = torch.nan
    assert "the loss of step 3 is nan; first not finite: the images of the batch" in stopped(Small(), images=images)


def test_where_looking_is_free_the_step_itself_is_stopped():
    message = stopped(Small(), Poison(3, spoil_first_layer))
    assert "the loss of step 3 is inf; first not finite: 0.weight, the first of 1 weights that hold NaN or infinity" in message


@pytest.mark.parametrize(("every", "seen"), [(4, 5), (6, 7), (50, 10)])
def test_elsewhere_it_is_seen_at_the_next_look(late, every, seen):
    # The update of step 3 was taken: by the time of the look all weights behind the first are lost as well.
    message = stopped(Small(), Poison(3, spoil_first_layer), every=every)
    assert f"the loss of step 3 is inf, seen at step {seen}; first not finite: 0.weight, the first of 4 weights" in message


def test_looks_are_few(late, monkeypatch):
    looks = []
    for name in ("all_finite", "agreed"):
        look = getattr(finite, name)
        monkeypatch.setattr(finite, name, lambda *args, look=look: looks.append(1) or look(*args))
    fit(Small(), every=50, steps=40)
    assert len(looks) == 4  # the first images, the first loss and its gradients, the end of the epoch, the weights at the end


def test_steps_that_a_gradient_scaler_skips_are_no_error():
    # At this scale gradients overflow until the scaler has halved it often enough.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    seen = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(bool(pl_module.net[0].weight.grad.isfinite().all()))

    fit(Small(), Watch(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], steps=30)
    assert seen[0] is False
    assert seen[-1] is True


def test_gradients_are_looked_at_before_they_are_used():
    class Spoil(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 2:
                pl_module.net[0].weight.grad[0, 0] = torch.inf

    module = Small()
    message = stopped(module, Spoil())
    assert "gradients of step 2 hold NaN or infinity (1 tensors, first 0.weight); first not finite: the loss or its gradient" in message
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_weights_that_turn_bad_in_the_last_step_are_seen():
    assert "weights hold NaN or infinity after step 9 (1 tensors, first 0.weight)" in stopped(Small(), Poison(10, spoil_first_layer))


def test_a_module_is_blamed_only_if_its_input_is_fine():
    module = Small()
    module.net[1].register_forward_hook(lambda module, args, output: output * torch.nan)
    assert find_cause(module, [torch.ones(2, 3)]) == "the output of 1 (Identity)"
    module.net.train()
    find_cause(module, [torch.ones(2, 3)])
    assert module.net.training


def test_a_teacher_can_be_at_fault():
    module = Small()
    module.teacher = lambda images: images * torch.nan
    assert find_cause(module, [torch.ones(2, 3)]) == "the teacher's logits"


@pytest.mark.parametrize("every", [0, -1, 1.5, "x", None])
def test_the_interval_is_checked(every):
    with pytest.raises(qat.UsageError, match=r"callbacks.finite.every_n_steps=.*: must be an integer of at least 1"):
        FaultGuard(every_n_steps=every)


# --- in runs of the command

SIX = ("trainer.limit_train_batches=6", "checkpoint.every_n_steps=2")


def poisoned(monkeypatch, refused, run_dir, poison, *overrides):
    make = parts.build_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(parts, "build_callbacks", lambda cfg: [*make(cfg), poison])
        return refused("train", tiny(run_dir, *SIX, *overrides))


def checkpoints(run_dir):
    """Step of each checkpoint, all of them finite."""
    found = {}
    for path in (run_dir / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in content["state_dict"].values() if value.is_floating_point()), path
        found[path.name] = content["global_step"]
    return found


@pytest.mark.parametrize("is_late", [False, True])
def test_damaged_weights_reach_no_file_and_the_run_goes_on_from_the_last_good_one(tmp_path, monkeypatch, refused, is_late):
    monkeypatch.setattr(finite, "_is_free", lambda tensor: not is_late)
    run = tmp_path / "run"
    message = poisoned(monkeypatch, refused, run, Poison(3, damage))
    assert "training stopped: the loss of step 3 is nan" in message
    assert "first not finite: " in message
    assert is_late or "blocks.0.mlp.fc1.weight, the first of 1 weights" in message
    assert checkpoints(run) == {"last.ckpt": 2}
    train(run, *SIX, "resume=true")
    assert checkpoints(run)["last.ckpt"] == 6
    assert results(run)["top1"] is not None
    assert "error" not in results(run)


def test_damage_in_the_step_of_a_checkpoint_is_seen_before_it_is_written(tmp_path, monkeypatch, refused):
    message = poisoned(monkeypatch, refused, tmp_path / "run", Poison(4, damage))
    assert "weights hold NaN or infinity after step 3 (1 tensors, first blocks.0.mlp.fc1.weight)" in message
    assert checkpoints(tmp_path / "run") == {"last.ckpt": 2}


def test_best_is_not_overwritten_either(tmp_path, monkeypatch, refused):
    run = tmp_path / "run"
    poisoned(monkeypatch, refused, run, Poison(12, damage), "trainer.max_epochs=3", "checkpoint.every_n_steps=null")
    assert checkpoints(run) == {"best.ckpt": 6, "last.ckpt": 6}


@pytest.mark.parametrize("quant", ["fp", "ofq_2bit"])
def test_the_layer_that_overflows_is_named(tmp_path, monkeypatch, refused, quant):
    message = poisoned(monkeypatch, refused, tmp_path / "run", Poison(3, overflow), f"quant={quant}")
    # Behind a quantizer an infinity is the highest code: the loss is fine, its gradient is not.
    assert ("the loss of step 3 is " if quant == "fp" else "gradients of step 3 hold NaN") in message
    assert "first not finite: the output of blocks.0.mlp.act (GELU)" in message
    assert "error" in results(tmp_path / "run")
