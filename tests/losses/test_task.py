"""Cross-entropy. Oracle: closed forms on log-probabilities."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qat.losses import CrossEntropy, StepContext
from tests.errors import usage_error
from tests.tiny import randn

LOGITS = randn(6, 4)
LOG_P = LOGITS - LOGITS.exp().sum(-1, keepdim=True).log()
CLASSES = torch.tensor([0, 3, 1, 1, 2, 0])
HARD = -LOG_P[torch.arange(6), CLASSES].mean()


def loss(logits, target, **settings):
    return CrossEntropy(**settings)(StepContext(logits, target, None, nn.Identity()))


def test_class_ids():
    assert_close(loss(LOGITS, CLASSES), HARD)


def test_label_smoothing_moves_mass_to_all_classes():
    assert_close(
        loss(LOGITS, CLASSES, label_smoothing=0.1), 0.9 * HARD - 0.1 * LOG_P.mean(-1).mean()
    )


def test_two_heads_are_averaged_before_the_loss():
    shift = randn(6, 4, seed=2)
    assert_close(loss((LOGITS + shift, LOGITS - shift), CLASSES), HARD)


def test_half_precision_logits_give_a_float32_loss():
    value = loss(LOGITS.bfloat16(), CLASSES)
    assert value.dtype == torch.float32
    assert_close(value, loss(LOGITS.bfloat16().float(), CLASSES), rtol=0, atol=0)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_outside_the_range_is_refused(smoothing):
    with usage_error(rf"^loss\.label_smoothing={smoothing}: "):
        CrossEntropy(label_smoothing=smoothing)
