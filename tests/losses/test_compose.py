"""The sum of terms. Oracle: closed form."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qat.losses import CompositeLoss, CrossEntropy, FeatureDistillation, LossTerm, StepContext
from tests.errors import usage_error


class Square(LossTerm):
    """Mean square of the logits."""

    def forward(self, step):
        return step.prediction.square().mean()


class Mean(LossTerm):
    """Mean of the logits."""

    def forward(self, step):
        return step.prediction.mean()


def step(logits):
    return StepContext(logits, torch.tensor([0]), None, nn.Identity())


def test_total_is_the_weighted_sum_and_parts_are_unweighted():
    logits = torch.tensor([[1.0, 2.0, 6.0]], requires_grad=True)
    total, parts = CompositeLoss({"square": Square(weight=0.5), "mean": Mean(weight=3.0)})(
        step(logits)
    )
    assert {name: float(value) for name, value in parts.items()} == {
        "square": pytest.approx(41 / 3),
        "mean": 3.0,
    }
    assert total.item() == pytest.approx(0.5 * 41 / 3 + 3.0 * 3.0)
    total.backward()
    assert_close(logits.grad, 0.5 * 2 * logits.detach() / 3 + 3.0 / 3)
    assert not any(value.requires_grad for value in parts.values())


def test_terms_that_read_other_blocks_are_refused():
    last, again = FeatureDistillation(blocks="last"), FeatureDistillation(blocks="last")
    assert CompositeLoss({"ce": CrossEntropy(), "last": last, "again": again}).blocks == "last"
    with usage_error(r"^loss\.terms: blocks are \['all', 'last'\]; "):
        CompositeLoss({"last": last, "every": FeatureDistillation(blocks="all")})


@pytest.mark.parametrize(
    ("terms", "setting"),
    [
        ({}, r"loss\.terms=\{\}"),
        ({"mine": nn.Linear(1, 1)}, r"loss\.terms\.mine"),
        *(
            ({name: CrossEntropy()}, r"loss\.terms")
            for name in ("training", "values", "a.b", "", 5)
        ),
    ],
    ids=["none", "class", "training", "values", "a.b", "empty", "number"],
)
def test_terms_that_cannot_be(terms, setting):
    with usage_error(f"^{setting}: "):
        CompositeLoss(terms)


def test_the_prediction_is_the_mean_of_two_heads():
    first, second = torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, -1.0]])
    two, one = step((first, second)), step(first)
    assert (two.heads, two.prediction.tolist()) == ((first, second), [[3.0, 1.0]])
    assert one.heads[0] is one.heads[1] is one.prediction is first
