"""Quantized Linear and the MLP around it. Oracle: the product of the quantized operands."""

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.nn import QuantLinear
from tests.tiny import converted, images, logits, quantized, sites, vit


def fc1(net):
    return net.blocks[0].mlp.fc1


def test_product_of_the_quantized_operands():
    linear = fc1(quantized())
    x = torch.randn(2, 17, 32)
    expected = F.linear(linear.input_quantizer(x), linear.weight_quantizer(linear.weight), linear.bias)
    assert_close(linear(x), expected)
    assert (linear(x) - F.linear(x, linear.weight, linear.bias)).abs().max() > 0.1


def test_is_a_linear_with_the_parameters_of_the_one_it_replaces():
    net = vit()
    weight, bias = fc1(net).weight, fc1(net).bias
    qat.convert(net, qat.recipe("ofq"), input_size=(1, 8, 8))
    assert isinstance(fc1(net), QuantLinear)
    assert isinstance(fc1(net), nn.Linear)
    assert fc1(net).weight is weight
    assert fc1(net).bias is bias
    assert fc1(net).latent("weight") is weight


def test_other_roles_have_no_weight():
    with pytest.raises(KeyError, match="qk"):
        fc1(converted()).latent("qk")


def test_second_linear_of_an_mlp_is_unsigned():
    net = converted()
    assert [sites(net)[f"blocks.0.mlp.{fc}.input_quantizer"].quantizer.spec.signed for fc in ("fc1", "fc2")] == [True, False]


class Tail(nn.Module):
    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize(
    ("activation", "norm", "signed"), [(nn.ReLU, None, False), (nn.GELU, None, False), (Tail, None, True), (nn.GELU, nn.LayerNorm, True)]
)
def test_sign_follows_what_stands_in_front(activation, norm, signed):
    net = nn.Sequential(timm.layers.Mlp(8, 16, act_layer=activation, norm_layer=norm))
    qat.convert(net, qat.recipe("ofq"), input_size=(1, 2, 8))
    assert net[0].fc2.input_quantizer.spec.signed is signed


def test_unsigned_input_has_no_negative_codes():
    net = quantized("lsq", bits=2)
    seen = []
    site = sites(net)["blocks.0.mlp.fc2.input_quantizer"]
    site.owner.register_forward_pre_hook(lambda m, args: seen.append(site.quantizer.codes(args[0])))
    logits(net, images())
    assert seen[0].unique().tolist() == [0, 1, 2, 3]
