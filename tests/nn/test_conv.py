"""Quantized patch embedding. Oracle: the convolution of the quantized operands."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.nn import QuantConv2d
from tests.tiny import images, quantized


def test_convolution_of_the_quantized_operands():
    net = quantized()
    conv = net.patch_embed.proj
    x = images()
    assert isinstance(conv, QuantConv2d)
    assert isinstance(conv, nn.Conv2d)
    assert_close(conv(x), F.conv2d(conv.input_quantizer(x), conv.weight_quantizer(conv.weight), conv.bias, stride=2))


def test_image_and_weight_have_eight_bits_each():
    conv = quantized(bits=2).patch_embed.proj
    assert (conv.input_quantizer.spec.role, conv.input_quantizer.spec.bits, conv.input_quantizer.axis) == ("image", 8, 1)
    assert (conv.weight_quantizer.spec.quantizer, conv.weight_quantizer.spec.bits, conv.weight_quantizer.axis) == ("lsq", 8, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1},
        {"padding": 1, "padding_mode": "reflect"},
        {"groups": 2},
        {"dilation": 2},
        {"bias": False},
        {"padding": "same"},
    ],
)
def test_settings_of_the_convolution_are_kept(settings):
    torch.manual_seed(0)
    plain = nn.Conv2d(2, 4, 3, **settings)
    x = torch.randn(3, 2, 8, 8)
    expected = plain(x)
    net = nn.Sequential(plain)
    qat.convert(net, qat.recipe("ofq", weight_quantizer="float", act_quantizer="float"), input_size=(2, 8, 8))
    assert isinstance(net[0], QuantConv2d)
    assert torch.equal(net(x), expected)


def test_only_the_first_convolution_is_quantized():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    qat.convert(net, qat.recipe("ofq"), input_size=(1, 8, 8))
    assert [type(m) for m in net] == [QuantConv2d, nn.Conv2d]
    assert ("1", "Conv2d") in qat.conversion_report(net).stays_float
