"""Runs that go back to their last checkpoint, and runs that leave steps out. Oracle: runs without the fault, or that left its step out."""

import csv

import pytest
import torch
from lightning.pytorch import Callback

from qat.callbacks import finite
from qat.tasks import fit as parts
from qat.tasks.train import train
from tests.conftest import tiny
from tests.tasks.test_resume import Kill, Killed

SETTINGS = (
    "trainer.limit_train_batches=6",
    "trainer.max_epochs=2",
    "checkpoint.every_n_steps=2",
    "trainer.log_every_n_steps=1",
    "callbacks=[default,ema,oscillation]",
    "callbacks.ema.decay=0.8",
    "callbacks.oscillation.probe_images=0",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "callbacks.throughput=null",  # it logs durations
)


class Spoil(Callback):
    """Puts NaN into the images of a step, each time it comes or the first time alone."""

    def __init__(self, *steps, once=False):
        self.steps, self.once, self.seen = steps, once, set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step = trainer.global_step
        if step in self.steps and not (self.once and step in self.seen):
            batch[0][0].fill_(torch.nan)
        self.seen.add(step)


class Damage(Callback):
    """Puts NaN into a weight once, behind a step."""

    def __init__(self, step):
        self.step, self.done = step, False

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step and not self.done:
            self.done = True
            with torch.no_grad():
                pl_module.net.blocks[0].mlp.fc1.weight[0, 0] = torch.nan


def go(run_dir, *callbacks, policy="rollback", overrides=()):
    """Runs the command in a directory with further callbacks; gives the directory."""
    make = parts.build_callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "build_callbacks", lambda cfg: [*make(cfg), *callbacks])
        train(tiny(run_dir, *SETTINGS, f"callbacks.finite.policy={policy}", *overrides))
    return run_dir


def last(run_dir):
    """Weights, averages, moments and trackers."""
    content = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    kept = {
        key: content[key] for key in ("global_step", "epoch", "state_dict", "averaging_state", "optimizer_states", "lr_schedulers", "loops")
    }
    return {**kept, "tracked": content["callbacks"]["Oscillation"]}


def alike(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def rows(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        found = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [{key: value for key, value in row.items() if not key.startswith("faults/")} for row in found]


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """A run that left three steps out: in front of the first save, between two saves, and in the next epoch."""
    run_dir = tmp_path_factory.mktemp("faults") / "skipped"
    go(run_dir, Spoil(1, 3, 8), policy="skip")
    return run_dir


@pytest.mark.long
def test_a_step_that_fails_again_is_left_out(skipped, tmp_path, caplog):
    back = go(tmp_path / "run", Spoil(1, 3, 8))
    assert alike(last(back), last(skipped))
    assert rows(back) == rows(skipped)
    said = [record.getMessage() for record in caplog.records if "rolled back" in record.getMessage() or "left out" in record.getMessage()]
    bad = "the loss of step {0} is nan; first not finite: the images of the batch"
    expected = [f"rolled back to step {to}: {bad.format(n)}|step {n} left out: {bad.format(n)}" for to, n in ((0, 1), (2, 3), (8, 8))]
    assert "|".join(said) == "|".join(expected)


@pytest.mark.long
def test_a_fault_that_does_not_come_again_leaves_no_trace(tmp_path, monkeypatch):
    healthy = go(tmp_path / "healthy", policy="stop")
    monkeypatch.setattr(finite, "_is_free", lambda tensor: False)  # all of it is seen late
    back = go(tmp_path / "run", Spoil(3, once=True), Damage(9))
    assert alike(last(back), last(healthy))
    assert rows(back) == rows(healthy)


def test_too_many_stop_the_run(tmp_path, refused, monkeypatch):
    make = parts.build_callbacks
    monkeypatch.setattr(parts, "build_callbacks", lambda cfg: [*make(cfg), Spoil(1, 3)])
    settings = ("callbacks.finite.policy=rollback", "callbacks.finite.max_rollbacks=1", "callbacks.oscillation=null")
    line = refused("train", tiny(tmp_path / "run", *SETTINGS, *settings))
    assert line == (
        "error: training stopped: the loss of step 3 is nan; first not finite: the images of the batch; rolled back 1 times before "
        "(callbacks.finite.max_rollbacks); checkpoints are from before; a lower optimizer.lr or trainer.gradient_clip_val=1 may help"
    )
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.long
def test_a_run_goes_on_from_a_checkpoint_behind_a_step_left_out(skipped, tmp_path):
    with pytest.raises(Killed):
        go(tmp_path / "run", Spoil(1, 3, 8), Kill(5), policy="skip")
    go(tmp_path / "run", Spoil(1, 3, 8), policy="skip", overrides=["resume=true"])
    assert alike(last(tmp_path / "run"), last(skipped))
    counts = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["FaultGuard"]
    assert {name: counts[name] for name in ("skipped", "in_a_row", "rollbacks")} == {"skipped": 3, "in_a_row": 0, "rollbacks": 0}


def test_the_settings_are_checked_first(tmp_path, refused):
    line = refused("train", tiny(tmp_path / "run", "callbacks.finite.policy=ignore"))
    assert line == "error: callbacks.finite.policy='ignore': allowed are stop, skip, rollback"
    assert not (tmp_path / "run" / "checkpoints").exists()
