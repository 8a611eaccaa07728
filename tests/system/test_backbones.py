"""Nets that give maps: `features_only=True` of timm, `forward_intermediates`. Oracle: timm's maps, the classifier of the same weights."""

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.testing import assert_close

import qat
from qat.ptq.search import logits_of
from qat.tasks.train import train
from tests.callbacks.fitting import weights as copies
from tests.conftest import tiny
from tests.errors import usage_error
from tests.nets import FAMILIES
from tests.tiny import float_recipe, identical, sites

# Name of a family, and what is asked of timm; by the class that timm wraps the net in.
BACKBONES = {
    "FeatureGetterNet": ("vit", {"out_indices": (0, 1)}),
    "FeatureListNet": ("swin", {"out_indices": (0, 1)}),
    "FeatureListNet, names changed": ("convnext", {}),
    "FeatureHookNet": ("swin", {"out_indices": (0, 1), "feature_cls": "hook"}),
}


def backbone(kind):
    """A float net that gives a list of maps, and the family it is of."""
    name, asked = BACKBONES[kind]
    net = FAMILIES[name].build(features_only=True, **asked)
    assert type(net).__name__ == kind.partition(",")[0]
    return net, FAMILIES[name]


def maps(net, x):
    with torch.no_grad():
        return net.eval()(x)


def assert_maps(found, expected, tolerance):
    """Equal up to this share of the largest value."""
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("kind", BACKBONES)
def test_without_rounding_the_maps_are_timms(kind):
    net, family = backbone(kind)
    expected = maps(net, family.images())
    qat.convert(net, float_recipe(family.attention), input_size=family.input_size)
    assert_maps(maps(net, family.images()), expected, 3e-6)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", BACKBONES)
def test_from_conversion_to_a_packed_file(kind, tmp_path):
    net, family = backbone(kind)
    recipe = qat.recipe("ofq", bits=4, attention=family.attention)
    qat.convert(net, recipe, input_size=family.input_size)
    x = family.images()
    with usage_error("are not initialized; call qat.initialize_scales"):
        net(x)
    qat.initialize_scales(net, [family.images(4)])
    before = copies(net)
    optimizer = create_optimizer_v2(net.train(), opt="adamw", lr=1e-3, weight_decay=0.05)
    sum(found.square().mean() for found in net(x)).backward()
    optimizer.step()
    weights = [(name, p) for name, p in net.named_parameters() if name.endswith("weight")]
    assert all(p.grad.isfinite().all() and not torch.equal(p, before[name]) for name, p in weights)

    expected = maps(net, x)
    qat.save(net, tmp_path / "net.ckpt")
    assert identical(maps(qat.load(tmp_path / "net.ckpt"), x), expected)
    frozen = qat.freeze(net)
    read = qat.from_pretrained(qat.save_pretrained(net, tmp_path / "shared"))
    assert identical(maps(read, x), maps(frozen, x))
    assert_maps(maps(frozen, x), expected, 2e-5)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_intermediates_of_a_classifier_are_the_maps_of_a_backbone(name):
    family = FAMILIES[name]
    net, x = family.quantized(bits=4), family.images()
    with torch.no_grad():
        last, found = net.forward_intermediates(x, indices=(0, 1))
        assert torch.equal(net.forward_head(last), net(x))
    wrapped = family.build(features_only=True, out_indices=(0, 1), feature_cls="getter")
    qat.convert(wrapped, qat.recipe("ofq", bits=4), input_size=family.input_size)
    state, names = net.state_dict(), wrapped.model.state_dict()
    wrapped.model.load_state_dict({name: state[name] for name in names if name in state})
    assert identical(maps(wrapped, x), found)


def test_a_net_around_it_is_converted_as_a_whole():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, _ = backbone("FeatureGetterNet")
            self.head = nn.Conv2d(64, 3, 1)

        def forward(self, x):
            return self.head(torch.cat(self.backbone(x), dim=1))

    net, x = Segmenter(), FAMILIES["vit"].images()
    qat.convert(net, qat.recipe("ofq", bits=4), input_size=FAMILIES["vit"].input_size)
    widths = {
        name: site.quantizer.spec.bits
        for name, site in sites(qat.initialize_scales(net, [x])).items()
        if site.is_weight
    }
    assert (
        widths["backbone.model.patch_embed.proj.weight_quantizer"]
        == widths["head.weight_quantizer"]
        == 8
    )
    with usage_error("save: this model does not record how timm built it"):
        qat.save(net, "never.ckpt")


def test_what_needs_classes_says_so(tmp_path):
    net, family = backbone("FeatureGetterNet")
    qat.convert(net, qat.recipe("ofq"), input_size=family.input_size)
    qat.initialize_scales(net, [family.images(4)])
    with usage_error(r"^export_onnx: the model returns several tensors"):
        qat.export_onnx(net, tmp_path / "net.onnx")
    with usage_error(r"^search: the model must return logits \(N, classes\)"):
        logits_of(net, family.images(), 2)
    with usage_error(r"^model.args: the model returns several tensors"):
        train(tiny(tmp_path, "+model.args.features_only=true", "+model.args.out_indices=[0]"))
    assert not list(tmp_path.glob("*.onnx"))
