"""Quantized convolutions. Oracle: the convolution of the quantized operands."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.nn import QuantConv2d
from tests.tiny import fitted, float_recipe, images, randn


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
    net = nn.Sequential(nn.Conv2d(2, 4, 3, **settings))
    x = torch.randn(3, 2, 8, 8)
    expected = net(x)
    qat.convert(net, float_recipe("standard"), input_size=(2, 8, 8))
    assert isinstance(net[0], QuantConv2d)
    assert torch.equal(net(x), expected)


def test_convolutions_inside_have_one_scale_and_no_offsets():
    # What a convolution pads with is zero, and has to be on the grid.
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3, padding=1, groups=2))
    fitted(net, images(), bits=2)
    assert [type(m) for m in net] == [QuantConv2d, QuantConv2d]
    inner = net[1].input_quantizer
    assert (inner.spec.role, inner.spec.bits, inner.num_stored_scales) == ("input", 2, 1)
    assert [n for n, _ in net[1].named_parameters() if "offset" in n] == []
    x = randn(2, 2, 6, 6)
    expected = F.conv2d(
        inner(x), net[1].weight_quantizer(net[1].weight), net[1].bias, padding=1, groups=2
    )
    assert_close(net[1](x), expected)
    assert inner(torch.zeros(1, 2, 6, 6)).eq(0).all()
