"""Scales and fitness along a run. Oracles: StatsQ's formula; the mean squared difference of logits."""

import pytest
import torch

from evidence.annealing_scales import scales
from evidence.overfitting import FitnessCurve
from qat.ptq.search import SearchSettings
from tests import tiny


@torch.no_grad()
def test_scales_are_twice_the_mean_magnitude_of_each_row():
    net = tiny.quantized("ofq")
    last = 2 * net.blocks[-1].mlp.fc2.weight.abs().mean(1)
    assert torch.equal(scales(net)[-len(last) :], last)


@torch.no_grad()
def test_a_curve_is_the_change_of_the_mean_fitness():
    net, other = tiny.quantized("lsq").eval(), tiny.quantized("lsq", bits=2).eval()
    x = tiny.images(4)
    curve = FitnessCurve(net, other, [x], SearchSettings(fitness="mse"))
    assert curve.values == pytest.approx([float((net(x) - other(x)).square().mean())])
    curve.values.append(3 * curve.values[0])
    assert curve.changes() == pytest.approx([0, 200])
