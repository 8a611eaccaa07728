"""Runs that receive a signal. Oracles: the same run, uninterrupted; the step at which the signal was sent."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback

from qat.callbacks import LastCheckpoint, Preemption
from qat.cli import job
from qat.launch import signals
from qat.launch.signals import Preempted
from tests.callbacks.fitting import added, batches, module, net
from tests.callbacks.fitting import fit as train_module
from tests.conftest import compose
from tests.processes import in_processes
from tests.tasks.test_resume import SETTINGS, assert_same_run, last, metrics, run


class Send(Callback):
    """Sends this process signals in a step, or in the validation after it."""

    def __init__(self, step, *numbers, hook="on_train_batch_start"):
        self.step, self.numbers = step, numbers
        setattr(self, hook, self._send)

    def _send(self, trainer, *_):
        if trainer.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)
            self.step = -1


def stopped(run_dir, sender, *overrides):
    """Run the command until a signal ends it, and return the exit code."""
    settings = (*SETTINGS, "checkpoint.every_n_steps=null", f"run_dir={run_dir}", *overrides)
    with added(sender), pytest.raises(SystemExit) as stop:
        job.run_task(compose("train", *settings))
    return stop.value.code


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


# In mid-epoch; at the last step before a validation; in the validation after the last step of all.
STOPS = [
    (Send(3, signal.SIGUSR1), 4, 138, "preempted by SIGUSR1"),
    (Send(8, signal.SIGUSR2), 9, 140, "preempted by SIGUSR2"),
    (Send(11, signal.SIGINT), 12, 130, "stopped by Ctrl-C"),
    (
        Send(18, signal.SIGUSR1, signal.SIGTERM, hook="on_validation_batch_start"),
        18,
        143,
        "stopped by SIGTERM",
    ),
]


def test_it_goes_on_where_it_stopped(tmp_path, caplog, full):
    run_dir = tmp_path / "run"
    for sender, saved_at, code, verb in STOPS:
        caplog.clear()
        assert stopped(run_dir, sender, "resume=auto") == code
        assert last(run_dir)["global_step"] == saved_at
        (line,) = [text for text in caplog.messages if "last.ckpt written" in text]
        assert (
            line
            == f"{verb} after training step {saved_at}: last.ckpt written; the same command resumes with resume=auto run_dir={run_dir}"
        )
        assert not (run_dir / "results.json").exists()
    run(run_dir, "resume=auto")
    assert_same_run(run_dir, full)
    assert metrics(run_dir) == metrics(full)


@pytest.mark.parametrize("is_saved", [True, False])
def test_handlers_are_gone_afterwards_and_lightnings_own_are_not_asked(tmp_path, is_saved):
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    callbacks = [Preemption(), Send(2, signal.SIGTERM)]
    if is_saved:
        callbacks.append(LastCheckpoint(dirpath=str(tmp_path)))
    with pytest.raises(Preempted) as stop:
        train_module(module(net()), *callbacks, enable_checkpointing=True)
    assert (stop.value.step, stop.value.saved) == (3, tmp_path / "last.ckpt" if is_saved else None)
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


class Note(Callback):
    """Writes the step at which a process stopped."""

    def __init__(self, folder):
        self.folder = folder

    def on_exception(self, trainer, pl_module, exception):
        (self.folder / f"{trainer.global_rank}.txt").write_text(
            f"{type(exception).__name__} {exception.signal} {exception.step}"
        )


def _one_of_two(folder):
    learner = module(net())
    rank = int(os.environ["RANK"])
    sender = [Send(1, signal.SIGUSR1)] if rank == 1 else []
    callbacks = [LastCheckpoint(dirpath=str(folder)), Preemption(), Note(folder), *sender]
    train_module(
        learner,
        *callbacks,
        data=batches(4, 64),
        strategy="ddp",
        devices=2,
        enable_checkpointing=True,
    )


@pytest.mark.long
def test_all_processes_stop_at_the_same_step_when_one_gets_the_signal(tmp_path):
    found = in_processes(2, _one_of_two, tmp_path)
    assert all(one.startswith("Preempted") for one in found), found
    # Sent in the second step, exchanged after it, acted on after the third.
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["Preempted 10 3"] * 2
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
