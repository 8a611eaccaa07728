"""Distillation of the outputs of blocks. Oracle: the formula, and forward passes with hooks."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qat import functional as F
from qat.lit import QATModule, Teacher
from qat.losses import CompositeLoss, Distillation, FeatureDistillation, StepContext
from tests import tiny
from tests.errors import usage_error


def blocks_of(net, images):
    """Output of each block."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in net.blocks
    ]
    net(images)
    for hook in hooks:
        hook.remove()
    return seen


def pair():
    net = tiny.vit()
    student = tiny.quantized(bits=2)
    loss = CompositeLoss({"kd": Distillation(), "features": FeatureDistillation(3.0)})
    return student, net, QATModule(student, loss, num_classes=10, teacher=Teacher(net))


def test_relative_to_the_variance_of_each_image():
    teacher = [torch.tensor([[[0.0, 2.0]], [[10.0, 30.0]]])]
    student = [torch.tensor([[[1.0, 2.0]], [[10.0, 10.0]]], requires_grad=True)]
    # Variances 1 and 100; mean squared errors 1/2 and 200.
    value = F.feature_distance(student, teacher)
    assert value.item() == (0.5 + 2.0) / 2
    value.backward()
    assert_close(student[0].grad, torch.tensor([[[0.5, 0.0]], [[0.0, -0.1]]]))


def test_what_is_compared_are_the_blocks_of_one_pass():
    student, net, module = pair()
    images, target = tiny.images(4), torch.arange(4)
    module.train()
    step = module.context((images, target))
    total, parts = module.loss(step)
    expected = F.feature_distance(blocks_of(student, images), blocks_of(net, images))
    assert_close(parts["features"], expected.detach())
    assert len(step.features) == len(net.blocks)
    total.backward()
    assert all(p.grad is None for p in net.parameters())
    first = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    (
        Distillation()(StepContext(student(images), target, net(images), student))
        + 3 * F.feature_distance(blocks_of(student, images), blocks_of(net, images))
    ).backward()
    assert_close(first, [p.grad for p in student.parameters()])


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_it_may_give_way_to_the_other_terms(progress, share):
    x, y = tiny.randn(2, 1, 4, 3)
    step = StepContext(
        torch.zeros(1, 2), torch.zeros(1).long(), None, nn.Identity(), progress, [x], [y]
    )
    assert_close(
        FeatureDistillation(1.0, schedule="cosine")(step), share * F.feature_distance([x], [y])
    )
    assert_close(FeatureDistillation(1.0)(step), F.feature_distance([x], [y]))


def test_made_again_for_the_backward_pass():
    """Under gradient checkpointing, blocks run twice and count once."""
    student, _, module = pair()
    module.train()
    batch = tiny.images(4), torch.arange(4)
    plain, _ = module.loss(module.context(batch))
    plain.backward()
    expected = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    student.set_grad_checkpointing(enable=True)
    for _ in range(2):
        student.zero_grad()
        step = module.context(batch)
        module.loss(step)[0].backward()
        assert len(step.features) == 2
    assert_close([p.grad for p in student.parameters() if p.grad is not None], expected)


@pytest.mark.parametrize(
    "teacher", [(), (torch.zeros(2, 5, 7),), (torch.zeros(2, 5, 8), torch.zeros(2, 5, 8))]
)
def test_a_teacher_of_another_shape_is_refused(teacher):
    step = StepContext(
        torch.zeros(2, 3),
        torch.zeros(2, dtype=torch.long),
        None,
        nn.Identity(),
        features=(torch.zeros(2, 5, 8),),
        teacher_features=teacher,
    )
    with usage_error(r"^loss\.features: .*\[\(5, 8\)\]"):
        FeatureDistillation(1.0)(step)
