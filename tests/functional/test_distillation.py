"""Distillation loss. Oracle: -sum p log q written out."""

import torch
from torch.testing import assert_close

from qat import functional as F
from tests.tiny import randn

STUDENT, DIST, TEACHER = (3 * randn(5, 7, seed=s) for s in range(3))
TARGET = torch.tensor([0, 3, 6, 2, 2])


def cross_entropy(p, logits):
    return -(p * logits.log_softmax(-1)).sum(-1).mean()


def test_soft_cross_entropy():
    assert_close(
        F.soft_cross_entropy(STUDENT, TEACHER), cross_entropy(TEACHER.softmax(-1), STUDENT)
    )


def test_class_head_learns_labels_and_distillation_head_the_teacher():
    one_hot = torch.nn.functional.one_hot(TARGET, 7).float()
    expected = cross_entropy(one_hot, STUDENT) + cross_entropy(TEACHER.softmax(-1), DIST)
    assert_close(F.distillation_loss(STUDENT, DIST, TEACHER, TARGET), expected)
    assert_close(F.distillation_loss(STUDENT, DIST, TEACHER, one_hot), expected)


def test_low_precision_logits_are_computed_in_float32():
    low = [t.bfloat16() for t in (STUDENT, DIST, TEACHER)]
    loss = F.distillation_loss(*low, TARGET)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.distillation_loss(*(t.float() for t in low), TARGET))
