"""The frozen net that a student follows. Oracle: timm's own layers."""

import pytest
import torch
from torch.testing import assert_close

from qat.lit import Teacher
from qat.lit.teacher import OutputRecorder
from qat.model.transform import renormalize
from tests.tiny import DISTILLED, VIT, images, logits, vit


def test_class_head_of_a_distilled_net():
    net = vit(DISTILLED)
    with torch.no_grad():
        expected = net.head(net.forward_features(images())[:, 0])
    assert_close(Teacher(net)(images()), expected, rtol=0, atol=0)
    assert (expected - logits(net)).abs().max() > 0.1


def test_blocks_are_those_that_are_asked_for():
    teacher = Teacher(vit())
    (last,), every = (
        teacher.with_features(images(), "last")[1],
        teacher.with_features(images(), "all")[1],
    )
    assert len(every) == len(teacher.net.blocks) > 1
    assert_close(every[-1], last, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "head"), [(VIT, "cls"), (VIT, "mean"), (DISTILLED, "mean")])
def test_the_one_head_or_the_mean_of_both_is_the_nets_own_evaluation(name, head):
    net = vit(name)
    assert_close(Teacher(net, head)(images()), logits(net), rtol=0, atol=0)


@pytest.mark.parametrize("name", [VIT, DISTILLED])
def test_it_gets_images_as_it_was_trained_with_them(name):
    teacher, pixels = Teacher(vit(name)), images()
    expected = teacher((pixels - 0.5) / 0.05)
    same = ([0.5], [0.05])
    renormalize(teacher.net, same, same)
    assert not teacher.net._forward_pre_hooks
    renormalize(teacher.net, ([0.3], [0.2]), same)
    assert_close(teacher((pixels - 0.3) / 0.2), expected, rtol=1e-4, atol=1e-4)
    assert set(teacher.net.state_dict()) == set(vit(name).state_dict())


def test_it_answers_in_the_students_autocast_dtype_and_keeps_nothing():
    teacher, kept = Teacher(vit()), []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        found = teacher(images().requires_grad_())
    assert found.dtype == torch.bfloat16
    assert found.grad_fn is None
    assert kept == []


def test_of_a_block_that_returns_a_tuple_the_hidden_states_count():
    hf_models = pytest.importorskip("tests.hf_models")
    swin = hf_models.KINDS["SwinForImageClassification"]
    net = swin.build()
    recorder = OutputRecorder.for_blocks(net, "all")
    with recorder.record_pass() as outputs:
        net(torch.randn(2, 3, swin.size, swin.size))
        assert [out.ndim for out in outputs] == [3, 3]
