"""Inputs with unsigned grids. Oracle: the order of layers and activations, read by hand."""

import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import qat
from qat.model.convert import apply_recipe, conversion_of
from tests.nets import FAMILIES
from tests.tiny import logits


def unsigned_layers(net):
    """Names of the layers whose inputs have no sign."""
    return {
        site.layer
        for site in qat.iter_quantizers(net)
        if site.role == "input" and site.quantizer.spec.signed is False
    }


@pytest.mark.parametrize(
    ("name", "layers"),
    {
        "pvt_v2": r"stages.\d.blocks.\d.mlp.fc2",
        "levit": r"stem.conv[234].linear|stages.\d.\w+(.\d)?.(attn\w*.proj.ln|mlp.ln2).linear",
        "mobilevit": r"stages.\d.\d.(conv[23]_\w+.conv|conv_1x1|transformer.\d.mlp.fc2)|final_conv.conv"
        r"|stages.[034].0.conv1_1x1.conv",
        "vit": r"blocks.\d.mlp.fc2",
        "eva02": r"nothing: its activation is a factor",
    }.items(),
)
def test_layers_after_an_activation(name, layers):
    net = FAMILIES[name].converted("lsq", attention="standard")
    inputs = {site.layer for site in qat.iter_quantizers(net) if site.role == "input"}
    assert unsigned_layers(net) == {layer for layer in inputs if re.fullmatch(layers, layer)}


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x):
        return self.last(self.function(self.first(x.flatten(1, 2))))


@pytest.mark.parametrize(
    ("function", "unsigned"),
    [
        (F.gelu, True),
        (timm.layers.QuickGELU(), True),
        (nn.Sequential(nn.Hardswish(), nn.Dropout()), True),
        (nn.Sequential(nn.GELU(), nn.LayerNorm(4)), False),
        (lambda x: F.silu(x, inplace=True), True),
        (lambda x: F.relu(x).transpose(1, 2).reshape(1, 4, 4).contiguous(), True),
        (lambda x: F.silu(x) * x, False),
        (lambda x: F.silu(x).neg_(), False),
        (lambda x: F.silu(x) + x, False),
        (nn.Tanh(), False),
    ],
)
def test_values_are_followed_to_the_layer(function, unsigned):
    net = qat.convert(Between(function), qat.recipe("lsq"), input_size=(1, 4, 4))
    assert unsigned_layers(net) == ({"last"} if unsigned else set())


@pytest.mark.parametrize("signs", ["tails", "probe"])
@pytest.mark.parametrize(
    ("function", "has_tail"),
    [
        (nn.SiLU(), True),
        (nn.Sequential(nn.Hardswish(), nn.Dropout()), True),
        (lambda x: F.silu(x, inplace=True).clone(), True),
        (nn.ReLU(), False),
        (nn.GELU(), False),
        (lambda x: F.relu(F.silu(x), inplace=True), False),
    ],
)
def test_convolutions_keep_long_negative_tails(function, has_tail, signs):
    """Their inputs have no offset that could fit a tail to an unsigned grid."""
    net = Between(function)
    net.first, net.last = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 4, 1)
    apply_recipe(net, qat.recipe("lsq"), input_size=(1, 4, 4), signs=signs)
    assert (unsigned_layers(net) == set()) == (has_tail and signs == "tails")


def test_values_are_followed_in_inference_mode():
    with torch.inference_mode():
        net = FAMILIES["siglip"].converted("lsq")
    assert "blocks.0.mlp.fc2" in unsigned_layers(net)


def test_a_layer_with_inputs_of_both_kinds_is_signed():
    layer = nn.Linear(4, 4)
    net = nn.Sequential(nn.Flatten(1, 2), nn.ReLU(), layer, layer)
    assert unsigned_layers(qat.convert(net, qat.recipe("lsq"), input_size=(1, 4, 4))) == set()


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "signs"), [("pvt_v2", "mlp"), ("mobilevit", "tails")])
def test_older_files_keep_their_grids(name, signs, tmp_path):
    path, family = tmp_path / "net.ckpt", FAMILIES[name]
    net = family.build()
    apply_recipe(net, qat.recipe("lsq"), input_size=family.input_size, signs=signs)
    qat.initialize_scales(net, [family.images()])
    qat.save(net, path)
    content = torch.load(path, weights_only=True)
    if signs == "mlp":
        del content["qat"]["signs"]
    torch.save(content, path)
    for _ in range(2):
        loaded = qat.load(path)
        assert conversion_of(loaded).signs == signs
        assert torch.equal(logits(loaded, family.images()), logits(net, family.images()))
        qat.save(loaded, path)
