"""Images per second in the logs."""

import csv

from lightning.pytorch.loggers import CSVLogger

from qat.callbacks import Throughput
from tests.lit.test_module import batches, module, trainer
from tests.tiny import vit


def test_it_counts_the_images_of_a_batch(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(logger=logger, log_every_n_steps=1, callbacks=[Throughput(window_size=2)]).fit(module(vit()), batches(4))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    counted = [float(row["train/samples"]) for row in rows if row["train/samples"]]
    assert counted == [4, 8, 12, 16]
    assert any(float(row["train/device/samples_per_sec"] or 0) > 0 for row in rows)
