"""Float models from files. Oracle: the float model from which a quantized one was made."""

import pytest
import torch

import qat
from tests.errors import usage_error
from tests.nets import FAMILIES
from tests.tiny import convert, identical, images, quantized, vit, with_scales


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.ckpt"


@pytest.mark.parametrize("num_classes", [10, 3])
def test_a_head_for_another_number_of_classes_is_new(path, num_classes):
    qat.save(quantized("seq"), path)
    net = qat.load_float(path, num_classes=num_classes)
    changed = {
        name
        for name, value in net.state_dict().items()
        if not torch.equal(value, vit().state_dict()[name])
    }
    assert changed == (set() if num_classes == 10 else {"head.weight", "head.bias"})
    assert net.num_classes == num_classes
    with_scales(convert(net, "seq"))


def test_no_classes_leave_no_head(path):
    net = vit()
    qat.save(net, path)
    x = images()
    assert torch.equal(
        qat.load_float(path, num_classes=0)(x),
        net.eval().forward_head(net.forward_features(x), pre_logits=True),
    )


def test_a_head_with_a_norm_is_removed(path):
    net = FAMILIES["levit"].build()
    qat.save(net, path)
    x = FAMILIES["levit"].images(2)
    net.reset_classifier(0)
    assert torch.equal(qat.load_float(path, num_classes=0).eval()(x), net.eval()(x))


def test_pooling_that_was_changed_later_stays(path):
    net = vit()
    net.reset_classifier(10, "avg")
    qat.save(net, path)
    x = images()
    assert torch.equal(qat.load_float(path).eval()(x), net.eval()(x))


@pytest.mark.parametrize("num_classes", [10, 3])
def test_images_are_prepared_as_the_file_says(path, num_classes):
    net = vit()
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (0.1,) * 3, "std": (0.2,) * 3}
    classes = list("abcdefghij")
    qat.save(net, path, classes=classes)
    found = qat.load_float(path, num_classes=num_classes)
    assert tuple(found.pretrained_cfg["mean"]) == (0.1,) * 3
    assert tuple(found.pretrained_cfg["std"]) == (0.2,) * 3
    assert getattr(found, "qat_classes", None) == (classes if num_classes == 10 else None)


def test_a_model_without_a_classifier(path):
    net = vit(num_classes=0)
    qat.save(net, path)
    assert identical(qat.load_float(path).state_dict(), net.state_dict())


def test_a_model_of_transformers(path):
    kind = pytest.importorskip("tests.hf_models").KINDS["ViTForImageClassification"]
    net = kind.converted(bits=4)
    qat.save(net, path)
    assert identical(qat.load_float(path).state_dict(), kind.build().state_dict())
    with usage_error(rf"^ckpt='{path}': num_classes=3: must be None for this model$"):
        qat.load_float(path, num_classes=3)


def test_a_backbone(path):
    net = vit(features_only=True, out_indices=(0, 1))
    qat.save(convert(net, "lsq"), path)
    assert identical(
        qat.load_float(path).state_dict(), vit(features_only=True, out_indices=(0, 1)).state_dict()
    )
