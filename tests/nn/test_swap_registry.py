"""The swap table. Oracle: a family made up here comes out swapped."""

import pytest
import torch
from torch import nn

import qat
from qat.nn import QuantLinear, QuantModule, Swap, register_swap, swap_registry


class Toy(nn.Module):
    """A family that qat has never seen: y = x * gain, then a Linear."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(x * self.gain)


class QuantToy(QuantModule):
    def __init__(self, toy, context):
        super().__init__()
        self.gain, self.out = toy.gain, toy.out
        self.input_quantizer = context.act("input")

    def forward(self, x):
        return self.out(self.input_quantizer(x) * self.gain)


class Lookalike(Toy):
    """A subclass is another family: it may do something else with the same parts."""


@pytest.fixture
def swaps(monkeypatch):
    monkeypatch.setattr(swap_registry, "_SWAPS", dict(swap_registry._SWAPS))


def toy_net():
    return nn.Sequential(nn.Flatten(1, 2), Toy(), Lookalike())


def test_a_new_family_is_one_decorated_function(swaps):
    @register_swap(Toy, "linear")
    def swap_toy(module, context):
        return Swap(QuantToy(module, context), {"out": "quantized"})

    net = qat.convert(toy_net(), qat.recipe("lsq"), input_size=(1, 3, 4))
    assert [type(m) for m in net] == [nn.Flatten, QuantToy, Lookalike]
    assert type(net[1].out) is QuantLinear
    assert [(s.name, s.role) for s in qat.iter_quantizers(net)] == [
        ("1.input_quantizer", "input"),
        ("1.out.weight_quantizer", "weight"),
        ("2.out.input_quantizer", "input"),
        ("2.out.weight_quantizer", "weight"),
    ]
    assert ("2", "Lookalike") in qat.conversion_report(net).stays_float
