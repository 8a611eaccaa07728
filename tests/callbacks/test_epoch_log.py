"""The line that each epoch logs. Oracle: the metrics of the trainer."""

import logging
import re
import types

from lightning.pytorch import Callback

from qat.callbacks import EpochLog, StepLimit
from tests.lit.test_module import batches, module, trainer
from tests.tiny import vit


class Metrics(Callback):
    """Copies of the metrics after every epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def epoch_lines(caplog):
    return [line for line in caplog.messages if line.startswith("epoch ")]


def test_one_line_an_epoch_with_the_accuracy_of_that_epoch(caplog):
    caplog.set_level(logging.INFO, "qat.callbacks.progress")
    seen = Metrics()
    trainer(max_epochs=3, check_val_every_n_epoch=2, callbacks=[seen, EpochLog()]).fit(
        module(vit()), batches(8), batches(16)
    )
    for number, (line, metrics) in enumerate(
        zip(epoch_lines(caplog), seen.epochs, strict=True), start=1
    ):
        assert line.startswith(f"epoch {number}/3  loss {metrics['train/loss']:.4g}  ")
        assert (f"  val accuracy {metrics.get('val/top1', 0):.2f} %  lr 1.00e-02" in line) == (
            number == 2
        )
        assert int(re.search(r"(\d+) img/s", line)[1]) > 0
    assert epoch_lines(caplog)[-1].endswith("left 0:00:00")


def test_the_time_left_ends_with_the_last_step(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "qat.callbacks.progress")
    seconds = iter([0, 20, 25])
    clock = types.SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("qat.callbacks.progress.time", clock)
    trainer(max_epochs=1000, callbacks=[EpochLog(), StepLimit(4)]).fit(
        module(vit()), batches(8), batches(16)
    )
    first, last = epoch_lines(caplog)
    assert first.endswith("left 0:00:20")
    assert last.endswith("left 0:00:00")
