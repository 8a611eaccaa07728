"""The line an epoch prints. Oracle: what the trainer's own metrics say."""

import logging
import re

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


def test_one_line_an_epoch_with_the_accuracy_of_that_epoch(caplog):
    caplog.set_level(logging.INFO, "qat.callbacks.progress")
    seen = Metrics()
    trainer(max_epochs=3, check_val_every_n_epoch=2, callbacks=[seen, EpochLog()]).fit(
        module(vit()), batches(8), batches(16)
    )
    for number, (line, metrics) in enumerate(
        zip(caplog.messages, seen.epochs, strict=True), start=1
    ):
        assert line.startswith(f"epoch {number}/3  loss {metrics['train/loss']:.4g}  ")
        assert (f"  val accuracy {metrics.get('val/top1', 0):.2f} %  lr 1.00e-02" in line) == (
            number == 2
        )
        assert int(re.search(r"(\d+) img/s", line)[1]) > 0
    assert caplog.messages[-1].endswith("left 0:00:00")
