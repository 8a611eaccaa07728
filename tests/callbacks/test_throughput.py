"""Images per second in the logs, and the time spent waiting for data. Oracle: a clock that stands still but for what the test lets pass."""

import csv
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import RunningStage

from qat.callbacks import EpochLog, Throughput
from qat.callbacks.waiting import advice
from qat.data.loader import ResumableLoader
from qat.data.sampler import SeededSampler
from tests.lit.test_module import batches, module, trainer
from tests.tiny import images, vit

N, SIZE = 16, 4


class Clock(torch.utils.data.Dataset):
    """Time, and images that take 0.75 s each."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.made = images(N)
        for name in ("qat.callbacks.waiting", "qat.data.loader"):
            monkeypatch.setattr(f"{name}.time", SimpleNamespace(perf_counter=lambda: self.now))

    def __len__(self):
        return N

    def __getitem__(self, key):
        _, index = key
        self.now += 0.75
        return self.made[index], index % 10

    def loader(self):
        return ResumableLoader(self, batch_size=SIZE, sampler=SeededSampler(N, seed=0, shuffle=True))


class Step(Callback):
    """A step takes a second, a validation 1000."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_start(self, *_):
        self.clock.now += 1

    def on_validation_batch_start(self, *_):
        self.clock.now += 1000


def rows(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


def test_it_counts_the_images_of_a_batch(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(logger=logger, log_every_n_steps=1, callbacks=[Throughput(window_size=2)]).fit(module(vit()), batches(4))
    found = rows(tmp_path)
    counted = [float(row["train/samples"]) for row in found if row["train/samples"]]
    assert counted == [4, 8, 12, 16]
    assert any(float(row["train/device/samples_per_sec"] or 0) > 0 for row in found)
    assert "throughput/data_wait_share" not in found[0], "a loader that does not count has no share"


@pytest.mark.parametrize(
    ("settings", "logged"),
    [({}, 8), ({"accumulate_grad_batches": 2}, 4), ({"val_check_interval": 2}, 8), ({"log_every_n_steps": 4}, 2)],
)
def test_share_of_the_time_spent_waiting_for_the_loader(tmp_path, monkeypatch, settings, logged):
    clock = Clock(monkeypatch)
    options = {"log_every_n_steps": 1, "max_epochs": 2, "logger": CSVLogger(tmp_path, name="", version=""), **settings}
    trainer(**options, callbacks=[Step(clock), Throughput()]).fit(module(vit()), clock.loader(), batches(16))
    shares = [float(row["throughput/data_wait_share"]) for row in rows(tmp_path) if row["throughput/data_wait_share"]]
    # A batch of four takes 3 s, its step 1 s; validations count for nothing.
    assert shares == pytest.approx([0.75] * logged)


def test_the_line_of_an_epoch_says_so_and_what_to_try(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    clock = Clock(monkeypatch)
    trainer(callbacks=[Step(clock), EpochLog()], val_check_interval=2).fit(module(vit()), clock.loader(), batches(16))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "qat.callbacks.epoch_log"]
    assert " img/s  waiting for data 75 % of the time: try data.num_workers=3  left " in line


def test_the_line_is_about_the_process_that_waits_longest(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    log, run = EpochLog(), Mock(world_size=2, num_devices=2, train_dataloader=Mock(num_workers=1))
    run.strategy.root_device = "cpu"
    run.strategy.reduce = lambda times, reduce_op: {"max": torch.maximum}[reduce_op](times, torch.tensor([5.0, 0.5]))
    monkeypatch.setattr(log._clock, "read", lambda _: (0.1, 0.01))
    assert log._waiting(run) == "  waiting for data 50 % of the time: try data.num_workers=2"
    run.world_size = 1
    assert log._waiting(run) == ""


@pytest.mark.parametrize(
    ("share", "workers", "processes", "said"),
    [
        (0.75, 0, 1, "try data.num_workers=3"),  # decoding takes three times as long as the step
        (0.5, 4, 1, "try data.num_workers=8"),
        (0.9, 4, 1, "try data.num_workers=16"),  # 40 would be needed
        (1.0, 0, 1, "try data.num_workers=16"),
        (0.9, 2, 4, "try data.num_workers=4"),
        (0.5, 16, 1, "data.num_workers=16 has all 16 cores of a process at work"),
    ],
)
def test_workers_that_would_keep_up(monkeypatch, share, workers, processes, said):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    assert advice(share, workers, processes) == said


def test_no_step_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=AssertionError("the step waits")))
    monitor, run = Throughput(), Mock()
    run.state.stage = RunningStage.TRAINING
    run.strategy.root_device = torch.device("cuda")
    monitor._throughputs[RunningStage.TRAINING] = Mock()
    monitor._start(run)
    monitor._update(run, Mock(flops_per_batch=None), (torch.zeros(4, 1), None), 1)
    assert monitor._throughputs[RunningStage.TRAINING].update.call_args.kwargs["samples"] == 4
