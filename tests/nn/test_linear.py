"""Quantized Linear and the MLP around it. Oracle: the product of the quantized operands."""

import pytest
import timm.layers
from torch import nn

import qat


def fc1(net):
    return net.blocks[0].mlp.fc1


class Tail(nn.Module):
    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize(
    ("activation", "norm", "signed"),
    [
        (nn.ReLU, None, False),
        (nn.GELU, None, False),
        (Tail, None, True),
        (nn.GELU, nn.LayerNorm, True),
    ],
)
def test_sign_follows_what_stands_in_front(activation, norm, signed):
    net = nn.Sequential(timm.layers.Mlp(8, 16, act_layer=activation, norm_layer=norm))
    qat.convert(net, qat.recipe("ofq"), input_size=(1, 2, 8))
    assert net[0].fc2.input_quantizer.spec.signed is signed
