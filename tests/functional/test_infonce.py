"""Losses between logits. Oracle: closed forms and torch's own losses."""

import math

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from qat.functional.infonce import FITNESSES
from tests.tiny import randn


def test_only_the_queries_learn():
    q, k = randn(6, 4).requires_grad_(), randn(6, 4, seed=1).requires_grad_()
    for kind in FITNESSES:
        q.grad = None
        F.logit_fitness(kind)(q, k).backward()
        assert q.grad.abs().sum() > 0
        assert k.grad is None


def test_fitnesses_by_hand():
    q, k = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert F.logit_fitness("mse")(q, k).item() == pytest.approx(0.5)
    assert F.logit_fitness("cosine")(q, k).item() == pytest.approx(1 - (math.sqrt(0.5) + 1) / 2)
    p, r = k.softmax(-1), q.softmax(-1)
    assert_close(F.logit_fitness("kl")(q, k), (p * (p / r).log()).sum(1).mean())
    assert torch.equal(F.logit_fitness("infonce", 0.5)(q, k), F.info_nce(q, k, 0.5))


@pytest.mark.parametrize("kind", FITNESSES)
def test_half_precision_is_computed_in_float32(kind):
    q, k = randn(6, 4).bfloat16(), randn(6, 4, seed=1).bfloat16()
    out = F.logit_fitness(kind)(q, k)
    assert out.dtype == torch.float32
    assert torch.equal(out, F.logit_fitness(kind)(q.float(), k.float()))
