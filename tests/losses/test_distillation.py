"""OFQ's distillation term. Oracle: closed form, spec of the paper's loss: CE(cls, target) - mean sum softmax(teacher) log_softmax(dist)."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qat.losses import CrossEntropy, Distillation, StepContext
from tests.errors import usage_error
from tests.tiny import randn

CLS, DIST, TEACHER = randn(3, 5, 4)
CLASSES = torch.tensor([0, 3, 1, 1, 2])


def hard(logits):
    return -logits.log_softmax(-1)[torch.arange(5), CLASSES].mean()


def soft(logits):
    return -(TEACHER.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def loss(logits, target=CLASSES, teacher=TEACHER, **settings):
    return Distillation(**settings)(StepContext(logits, target, teacher, nn.Identity()))


def test_one_head_gets_both_targets():
    assert_close(loss(CLS), hard(CLS) + soft(CLS))


def test_probabilities_as_target():
    target = randn(5, 4, seed=1).softmax(-1)
    expected = -(target * CLS.log_softmax(-1)).sum(-1).mean() + soft(DIST)
    assert_close(loss((CLS, DIST), target), expected)


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_each_head_has_its_own_target_and_hard_labels_a_weight(weight):
    assert_close(loss((CLS, DIST), hard_weight=weight), weight * hard(CLS) + soft(DIST))


def test_a_temperature_softens_teacher_and_student_and_keeps_the_size_of_the_gradient():
    softened = -((TEACHER / 3).softmax(-1) * (DIST / 3).log_softmax(-1)).sum(-1).mean()
    assert_close(loss((CLS, DIST), temperature=3), hard(CLS) + 9 * softened)
    # Of a high temperature the limit is known: the distance of centred logits over K, whose gradient has no temperature in it.
    logits = DIST.clone().requires_grad_()
    loss((CLS, logits), hard_weight=0, temperature=1e3).backward()
    centred = (DIST - DIST.mean(-1, keepdim=True)) - (TEACHER - TEACHER.mean(-1, keepdim=True))
    assert_close(logits.grad, centred / (4 * 5), rtol=1e-2, atol=1e-4)


def test_half_precision_logits_give_a_float32_loss():
    cls, dist, teacher = (logits.bfloat16() for logits in (CLS, DIST, TEACHER))
    value = loss((cls, dist), teacher=teacher)
    assert value.dtype == torch.float32
    expected = loss((cls.float(), dist.float()), teacher=teacher.float())
    assert torch.equal(value, expected)


@pytest.mark.parametrize(("setting", "value"), [("temperature", 0), ("hard_weight", -1)])
def test_settings_outside_the_range_are_refused(setting, value):
    with usage_error(rf"^loss\.{setting}={value}: "):
        Distillation(**{setting: value})


def test_only_terms_that_follow_a_teacher_ask_for_one():
    assert Distillation().needs_teacher
    assert not CrossEntropy().needs_teacher


def test_a_step_without_teacher_is_refused():
    with pytest.raises(ValueError, match="needs teacher logits"):
        loss(CLS, teacher=None)
