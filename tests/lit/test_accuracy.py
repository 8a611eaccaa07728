"""Accuracy without a trainer. Oracle: counted by hand."""

import math

import torch
from torch.testing import assert_close

from qat.lit.accuracy import evaluate

CPU = torch.device("cpu")


def split(logits, target, size):
    return list(zip(logits.split(size), target.split(size), strict=True))


def test_percent_over_uneven_batches():
    # Ranks of the right class: 1, 2, 6, 1, 5 of 6 classes; two are first, four among the first five.
    logits = torch.arange(6, 0, -1).float().expand(5, 6).clone()
    target = torch.tensor([0, 1, 5, 0, 4])
    found = evaluate(lambda x: x, split(logits, target, 3), 6, CPU)
    assert found["top1"] == 40.0
    assert found["top5"] == 80.0
    log_p = logits.log_softmax(-1)[torch.arange(5), target]
    assert_close(torch.tensor(found["loss"]), -log_p.mean())


def test_a_net_that_breaks_on_some_images_has_no_loss():
    logits, target = torch.eye(4), torch.arange(4)
    broken = torch.where(torch.arange(4)[:, None] < 2, logits, torch.nan)
    found = evaluate(lambda x: x, split(broken, target, 2), 4, CPU)
    assert math.isnan(found["loss"])


def test_top5_of_three_classes_is_everything():
    logits, target = torch.eye(3), torch.tensor([1, 1, 1])
    found = evaluate(lambda x: x, split(logits, target, 2), 3, CPU)
    assert found["top5"] == 100.0
    assert abs(found["top1"] - 100 / 3) < 1e-4
