"""Distillation loss in half precision; its values are in tests/losses. Oracle: float32."""

import torch

from qat import functional as F
from tests.tiny import randn


def test_low_precision_logits_are_computed_in_float32():
    logits = [3 * randn(5, 7, seed=seed).bfloat16() for seed in range(3)]
    target = torch.tensor([0, 3, 6, 2, 2])
    loss = F.distillation_loss(*logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.distillation_loss(*(t.float() for t in logits), target))
