"""Runs that end at a limit of steps, time or patience. Oracle: the same run without the limit, or with a later one."""

import shutil

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer

from tests.callbacks.fitting import added
from tests.conftest import results
from tests.tasks.test_resume import assert_same_checkpoint, killed_at, last, metrics, run

EPOCHS = (
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
)


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.what(trainer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three epochs of four steps."""
    return run(tmp_path_factory.mktemp("whole") / "run", *EPOCHS)


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """The first ten steps of these."""
    return run(tmp_path_factory.mktemp("ten") / "run", *EPOCHS, "trainer.max_steps=10")


@pytest.mark.long
@pytest.mark.parametrize("step", [4, 6])
def test_a_run_with_a_limit_of_steps_goes_on(step, tmp_path, ten):
    run_dir = killed_at(step, tmp_path / "run", *EPOCHS, "trainer.max_steps=10")
    run(run_dir, *EPOCHS, "trainer.max_steps=10", "resume=auto")
    assert last(run_dir)["global_step"] == 10
    assert_same_checkpoint(run_dir, ten, "current_model_state")
    assert metrics(run_dir) == metrics(ten)


@pytest.mark.long
def test_a_later_limit_of_steps_loses_no_image(tmp_path, ten, whole, caplog):
    caplog.set_level("INFO")
    run_dir = run(tmp_path / "run", *EPOCHS, "trainer.max_steps=6")
    assert caplog.messages.count("trainer.max_steps=6 is reached") == 1
    assert last(run_dir)["global_step"] == 6
    run(run_dir, *EPOCHS, "trainer.max_steps=10", "resume=true")
    assert_same_checkpoint(run_dir, ten, "current_model_state")
    run(run_dir, *EPOCHS, "resume=true")
    assert_same_checkpoint(run_dir, whole, "current_model_state")


def test_a_run_at_its_limit_of_steps_stays_there(tmp_path, ten):
    again = shutil.copytree(ten, tmp_path / "run")
    run(again, *EPOCHS, "trainer.max_steps=10", "resume=true")
    assert_same_checkpoint(again, ten, "current_model_state")
    kept = ("top1", "val_top1", "weights")
    assert [results(again)[key] for key in kept] == [results(ten)[key] for key in kept]


@pytest.mark.long
def test_a_later_limit_of_time_loses_no_image(tmp_path, whole):
    run_dir = tmp_path / "run"
    with added(At(6, lambda trainer: setattr(trainer, "should_stop", True))):
        run(run_dir, *EPOCHS)
    assert last(run_dir)["global_step"] == 6
    run(run_dir, *EPOCHS, "resume=true")
    assert_same_checkpoint(run_dir, whole, "current_model_state")


@pytest.mark.long
def test_a_limit_of_time_waits_for_the_step(tmp_path, monkeypatch):
    settings = (*EPOCHS, "trainer.max_epochs=1", "trainer.accumulate_grad_batches=2")
    with monkeypatch.context() as patch:
        patch.setattr(
            Timer, "time_elapsed", lambda timer, *_: 0 if timer.start_time() is None else 60
        )  # over after the first batch
        run_dir = run(tmp_path / "run", *settings, "+trainer.max_time=00:00:00:30")
    assert last(run_dir)["global_step"] == 1
    run(run_dir, *settings, "resume=true")
    assert_same_checkpoint(run_dir, run(tmp_path / "whole", *settings), "current_model_state")


def test_the_last_step_is_validated(ten):
    """The recorded score of a file is the score of its weights."""
    rows = [row for row in metrics(ten) if "val/top1" in row]
    assert [int(row["step"]) for row in rows] == [3, 7, 9]
