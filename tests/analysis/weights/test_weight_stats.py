"""Numbers of one weight tensor. Oracle: worked out by hand for small tensors; functions of qat.functional for large ones."""

import math

import pytest
import torch

import qat
from qat.analysis.weights.weight_stats import Master, code_usage, entropy, masters, weight_stats
from qat.functional import kurtosis, near_threshold
from qat.quantizers import LSQ, Affine, StatsQ
from qat.spec import QuantSpec
from tests import tiny
from tests.analysis.common import KINDS, net_of
from tests.quantizers.test_grid import Odd


def lsq(*steps, bits=2):
    quantizer = LSQ(QuantSpec("weight", "lsq", bits, axis=0))
    quantizer.scale = torch.nn.Parameter(torch.tensor(steps))
    return quantizer


def look(weight, quantizer, boundary=0.01):
    return weight_stats(Master("layer", "weight", torch.tensor(weight), quantizer), boundary)


def test_numbers_of_a_tensor_of_eight():
    # Codes -2 .. 1 on a step of 1: -2, -2 (clipped), 0, 0, 0, 1 (beyond), 1, 1 (clipped).
    stats = look([[-2.0, -3.0, 0.0, 0.25], [-0.25, 1.25, 1.0, 2.0]], lsq(1.0, 1.0))
    codes = stats.codes
    assert codes.low == -2
    assert codes.usage == pytest.approx([2 / 8, 0, 3 / 8, 3 / 8])
    assert codes.unused == 1
    assert codes.entropy == pytest.approx(0.25 * 2 + 2 * 0.375 * math.log2(8 / 3))
    assert codes.at_ends == pytest.approx(5 / 8)
    assert codes.beyond == pytest.approx(3 / 8)  # -3, 1.25, 2
    assert codes.clipped == pytest.approx(2 / 8)  # -3, 2
    assert codes.error == pytest.approx((1 + 0.25 + 0.25 + 0.25 + 1) / 8)
    squares = 4 + 9 + 0.0625 + 0.0625 + 1.5625 + 1 + 4
    assert codes.snr == pytest.approx(10 * math.log10(squares / (1 + 3 * 0.0625 + 1)))
    assert codes.step == (1, 1, 1)
    assert (stats.n_weights, stats.channels, stats.dead, stats.spread, stats.bits) == (8, 2, 0, 5, 2)
    assert sum(stats.histogram.share) == pytest.approx(1)


def test_error_is_counted_in_the_steps_of_each_channel():
    stats = look([[0.25, 1.0], [2.5, 10.0]], lsq(1.0, 10.0))
    assert stats.codes.error == pytest.approx(0.125)
    assert stats.codes.step == (1, 1, 10)  # torch's median is the lower of two


def test_a_weight_near_a_threshold_lies_between_two_codes_that_occur():
    # 0.505 is near 1/2; -1.5 lies between -2 and -1, of which neither is below the lowest code that occurs, -2.
    stats = look([[0.505, 0.0, 1.0, -1.5]], lsq(1.0))
    assert stats.codes.near == pytest.approx(2 / 4)
    # Without a weight at 1 there is no threshold at 1/2.
    assert look([[0.495, 0.0, 0.1, 0.2]], lsq(1.0)).codes.near == 0


def test_a_zero_point_moves_codes_not_errors():
    quantizer = Affine(QuantSpec("weight", "affine", 2, signed=False, axis=0))
    quantizer.scale, quantizer.zero_point = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 3.0])
    stats = look([[-0.5, 0.0, 0.5, 1.0], [-3.0, -2.0, -1.0, 0.25]], quantizer)
    assert stats.codes.usage == [0.25] * 4
    assert stats.codes.entropy == 2
    assert stats.codes.error == pytest.approx(0.25 / 8)
    assert stats.codes.beyond == pytest.approx(1 / 8)
    assert stats.codes.clipped == 0


def test_nothing_lost_is_an_infinite_ratio():
    assert look([[0.0, 1.0, -2.0]], lsq(1.0)).codes.snr == math.inf


def test_dead_channels_are_those_without_weights_or_at_one_level():
    weight = [[1.0, -1.0, 0.5], [0.0, 0.0, 0.0], [0.1, 0.2, -0.1], [1e-4, -1e-4, 0.0], [1.0, 0.9, -2.0]]
    assert look(weight, lsq(*[1.0] * 5)).dead == 3  # rows 1 and 3; row 2 is rounded to zeros
    assert look(weight, None).dead == 2


def test_a_constant_tensor_has_numbers():
    stats = look([[0.5, 0.5], [0.5, 0.5]], StatsQ(QuantSpec("weight", "statsq", 2, axis=0)))
    assert (stats.spread, stats.kurtosis, stats.dead) == (0, 0, 2)
    assert sum(stats.histogram.share) == pytest.approx(1)


def test_a_row_of_zeros_does_not_spoil_the_others():
    stats = look([[0.0, 0.0], [1.0, -1.0]], StatsQ(QuantSpec("weight", "statsq", 2, axis=0)))
    assert stats.codes.error == pytest.approx(0.5)  # scale 2, levels at 0.5 and 1.5, in steps of 1
    assert stats.codes.step[0] == 0
    assert sum(stats.histogram.share) == pytest.approx(1)


def test_a_quantizer_of_the_users_has_codes_and_no_thresholds():
    stats = look([[1.0, -2.0], [3.0, 0.0]], Odd(QuantSpec("weight", "odd", 2)))
    assert stats.codes.usage == [0, 0.25, 0.25, 0.5]
    assert stats.codes.snr == pytest.approx(10 * math.log10(14 / 5))
    assert math.isnan(stats.codes.clipped)
    assert math.isnan(stats.codes.step[1])


def test_codes_outside_the_bounds_widen_them():
    assert code_usage(torch.tensor([0, 5, -1]), 0, 3) == (pytest.approx([1 / 3, 1 / 3, 0, 0, 0, 0, 1 / 3]), -1)


def test_entropy_of_even_use_is_the_width():
    assert entropy([1 / 16] * 16) == pytest.approx(4)
    assert entropy([1.0, 0.0]) == 0


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_net(kind):
    net = net_of(kind)
    sites = {(s.name.rpartition(".")[0], s.role): s for s in qat.iter_quantizers(net) if s.is_weight}
    found = list(masters(net))
    assert {(m.layer, m.role) for m in found if m.quantizer is not None} == set(sites)
    for master in found:
        stats = weight_stats(master, 0.005)
        site = sites[master.layer, master.role]
        weight, rounded = site.latent(), site.quantizer(site.latent())
        assert stats.kurtosis == pytest.approx(float(kurtosis(weight)))
        noise = (weight - rounded).double().square().sum()
        assert stats.codes.snr == pytest.approx(float(10 * (weight.double().square().sum() / noise).log10()), rel=1e-4)
        assert len(stats.codes.usage) == 2**stats.bits
        assert sum(stats.codes.usage) == pytest.approx(1)
        assert 0 <= stats.codes.entropy <= stats.bits
        assert stats.codes.clipped <= stats.codes.beyond


@torch.no_grad()
def test_near_is_what_annealing_trains():
    for site in qat.iter_quantizers(net_of("ofq2")):
        if site.is_weight and site.quantizer.spec.quantizer == "statsq":
            weight = site.latent().detach()
            stats = weight_stats(Master("layer", site.role, weight, site.quantizer), 0.05)
            assert stats.codes.near == pytest.approx(float(near_threshold(weight, 2, 0.05).float().mean()))


@torch.no_grad()
def test_near_of_a_row_without_a_step_is_what_annealing_trains_too():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    quantizer = net_of("ofq2").blocks[0].mlp.fc1.weight_quantizer
    assert weight_stats(Master("layer", "weight", weight, quantizer), 0.01).codes.near == float(
        quantizer.grid(weight).near_threshold(weight, 0.01).float().mean()
    )


def test_a_float_net_has_its_layers_in_order():
    net = tiny.vit()
    names = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    found = list(masters(net))
    assert [m.layer for m in found] == names
    stats = weight_stats(found[1], 0.005)
    assert (stats.bits, stats.codes, stats.quantizer) == (32, None, "float")


def test_a_histogram_counts_what_lies_outside_in_its_ends():
    found = look([[-100.0, 100.0, 0.0, 0.0]], lsq(1.0)).histogram
    assert (found.low, found.high) == (-3.5, 2.5)
    assert (found.share[0], found.share[-1]) == (0.25, 0.25)
