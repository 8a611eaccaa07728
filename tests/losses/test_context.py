"""What a term sees of a step. Oracle: closed form."""

import torch
from torch import nn

from qat.losses import StepContext

FIRST, SECOND = torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, -1.0]])


def context(logits):
    return StepContext(logits, torch.tensor([0]), None, nn.Identity())


def test_a_net_with_two_heads_is_judged_by_their_mean():
    step = context((FIRST, SECOND))
    assert step.heads == (FIRST, SECOND)
    assert step.prediction.tolist() == [[3.0, 1.0]]


def test_a_net_with_one_head_has_it_in_both_places():
    step = context(FIRST)
    assert step.heads[0] is FIRST
    assert step.heads[1] is FIRST
    assert step.prediction is FIRST
