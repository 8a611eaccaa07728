"""Coordinates on the axis of codes. Oracle: the codes that the quantizers themselves give."""

import pytest
import torch
from qat.analysis.code_axis import code_bounds, placed

import qat
from qat.quantizers import Float, Quantizer
from qat.spec import QuantSpec
from tests import tiny
from tests.analysis.common import KINDS, net_of


def given(net):
    """(name, quantizer, what it is given) of every quantizer of a net that runs."""
    seen, handles = [], []
    for site in qat.iter_quantizers(net):
        hook = site.quantizer.register_forward_pre_hook(lambda module, args, name=site.name: seen.append((name, module, args[0])))
        handles.append(hook)
    with torch.no_grad():
        net(tiny.images(4, seed=7))
    for handle in handles:
        handle.remove()
    return [entry for entry in seen if not isinstance(entry[1], Float)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_code_is_the_coordinate_rounded_and_clamped(kind):
    found = given(net_of(kind))
    assert len(found) >= 10
    for name, quantizer, x in found:
        where = placed(quantizer, x)
        expected = quantizer.codes(x).float()
        assert torch.equal(where.z.round().clamp(where.low, where.high), expected), name
        assert (where.low, where.high) == code_bounds(quantizer), name
        assert expected.amin() >= where.low, name
        assert expected.amax() <= where.high, name


@pytest.mark.parametrize("kind", ["ofq2", "lsq4", "minmax", "ptq4", "signed"])
@torch.no_grad()
def test_neighbouring_levels_of_a_weight_are_a_step_apart(kind):
    for site in qat.iter_quantizers(net_of(kind)):
        if site.is_weight:
            weight = site.latent()
            where, values, codes = placed(site.quantizer, weight), site.quantizer(weight), site.quantizer.codes(weight).float()
            origin = values / where.step - codes
            assert (origin - origin.flatten(1)[:, :1].reshape(-1, *[1] * (weight.ndim - 1))).abs().max() < 1e-3


class Odd(Quantizer):
    """A quantizer that nobody knows: signs."""

    def forward(self, x):
        return x.sign()

    def codes(self, x):
        return x.sign().to(torch.int8)


def test_a_quantizer_of_the_users_has_no_axis():
    odd = Odd(QuantSpec("weight", "tests.analysis.test_code_axis:Odd", 2))
    assert placed(odd, torch.randn(3, 4)) is None
    assert code_bounds(odd) == (-2, 1)


def test_zeros_have_no_coordinate_on_a_scale_of_zero():
    net = net_of("ofq2")
    site = next(s for s in qat.iter_quantizers(net) if s.is_weight and s.quantizer.spec.quantizer == "statsq")
    weight = torch.randn(4, 8)
    weight[2] = 0
    z = placed(site.quantizer, weight).z
    assert z[2].isnan().all()
    assert z[[0, 1, 3]].isfinite().all()
