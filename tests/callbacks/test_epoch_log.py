"""The line an epoch prints. Oracle: what the trainer's own metrics say."""

import logging
import re
from unittest.mock import Mock

from lightning.pytorch import Callback

from qat.callbacks import EpochLog
from tests.lit.test_module import batches, module, trainer
from tests.tiny import vit


class Metrics(Callback):
    """Copies of the metrics after every epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "qat.callbacks.epoch_log"]


def test_one_line_an_epoch(caplog):
    caplog.set_level(logging.INFO)
    seen = Metrics()
    trainer(max_epochs=2, callbacks=[seen, EpochLog()]).fit(module(vit()), batches(8), batches(16))
    found = lines(caplog)
    assert len(found) == 2
    for number, (line, metrics) in enumerate(zip(found, seen.epochs, strict=True), start=1):
        assert line.startswith(f"epoch {number}/2  ")
        assert f"loss {metrics['train/loss']:.4g}  val top1 {metrics['val/top1']:.4g}  lr 1.00e-02" in line
        assert int(re.search(r"(\d+) img/s", line)[1]) > 0
    assert found[-1].endswith("left 0:00:00")


def test_without_validation_the_line_leaves_it_out(caplog):
    caplog.set_level(logging.INFO)
    trainer(callbacks=[EpochLog()]).fit(module(vit()), batches(8))
    (line,) = lines(caplog)
    assert "loss" in line
    assert "val" not in line


def test_an_epoch_without_validation_does_not_have_the_accuracy_of_an_earlier_one(caplog):
    caplog.set_level(logging.INFO)
    trainer(max_epochs=3, check_val_every_n_epoch=2, callbacks=[EpochLog()]).fit(module(vit()), batches(8), batches(16))
    assert ["val top1" in line for line in lines(caplog)] == [False, True, False]


def test_speed_counts_images_of_all_processes(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = [100.0]
    monkeypatch.setattr("qat.callbacks.epoch_log.time.monotonic", lambda: clock[0])
    log = EpochLog()
    run = Mock(current_epoch=0, max_epochs=3, world_size=2, callback_metrics={}, optimizers=[], is_global_zero=True, train_dataloader=None)
    log.on_train_start(run, None)
    for _ in range(5):
        log.on_train_batch_end(run, None, None, (list(range(8)), None), 0)
    clock[0] = 104.0
    log.on_train_epoch_end(run, None)
    # 5 batches x 8 images x 2 processes in 4 seconds; two more epochs of 4 seconds each.
    assert "20 img/s" in lines(caplog)[0]
    assert lines(caplog)[0].endswith("left 0:00:08")


def test_a_minute_into_a_long_run_it_says_how_long_it_will_take(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = [0.0]
    monkeypatch.setattr("qat.callbacks.epoch_log.time.monotonic", lambda: clock[0])
    log = EpochLog()
    run = Mock(current_epoch=2, max_epochs=5, world_size=1, num_training_batches=200, is_global_zero=True)
    log.on_train_start(run, None)
    for _ in range(4):
        clock[0] += 30.0
        log.on_train_batch_end(run, None, None, (list(range(60)), None), 100)
    # A batch of 60 images in 30 s; 200 batches an epoch, three epochs to go.
    assert lines(caplog) == ["2 img/s: about 1:40:00 of training an epoch, 5:00:00 for 3 epochs"]
