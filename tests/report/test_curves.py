"""Which losses share an axis. Oracle: what the columns of `metrics.csv` are named after."""

import re

import pytest

from qat.report.curves import training_curves

VALUES = {"step": 9, "val/loss": 1.0}


@pytest.mark.parametrize(
    ("columns", "titles"),
    [
        (("train/loss", "train/loss_ce"), ["Cross entropy"]),
        (("train/loss", "train/loss_ce", "train/loss_kure"), ["Cross entropy", "Training loss (ce + kure)"]),
        (("train/loss", "train/loss_kd"), ["Training loss (kd)", "Cross entropy of the validation images"]),
        (("train/loss",), ["Training loss", "Cross entropy of the validation images"]),
        (("train/loss_step",), ["Training loss", "Cross entropy of the validation images"]),
    ],
)
def test_only_what_measures_the_same_shares_an_axis(columns, titles):
    curves = training_curves([VALUES | dict.fromkeys(columns, 2.0)])
    assert [curve.title for curve in curves] == titles
    assert ("training: 2 at step 9." in curves[0].words) == (titles[0] == "Cross entropy")


def test_one_epoch_has_one_tick():
    (curve,) = training_curves([{"step": 9, "val/top1": 50.0}])
    assert re.findall(r"<text[^>]*>\s*([\d.]+)\s*</text>", str(curve.svg)).count("9") == 1
    assert not re.search(r">\s*[89]\.\d+\s*</text>", str(curve.svg))
