"""Weights that are moved to other grids temporarily. Oracle: the quantizers themselves where nothing is changed, else values worked out by hand."""

import contextlib
import functools
import operator

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.analysis.requantize import (
    all_float,
    nearest_power_of_two,
    requantize,
    requantize_weights,
    weight_sites,
)
from qat.quantizers import LSQ, DynamicMinMax, StatsQ
from qat.spec import QuantSpec
from tests import tiny
from tests.analysis.common import KINDS, affine, is_as_before, lsq, net_of, ptq, spec, state

ROW = [-1.0, -0.3, 0.1, 0.6]


def sites_of(net):
    """(site, latent weight, quantizer) of every quantized weight."""
    return [(s, s.latent().detach(), s.quantizer) for s in qat.iter_quantizers(net) if s.is_weight]


def times(ratio):
    return functools.partial(operator.mul, ratio)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_a_change_it_is_the_quantizer_and_32_bits_are_the_float_weight(kind):
    for site, weight, quantizer in sites_of(net_of(kind)):
        assert torch.equal(requantize(quantizer, weight), site.quantizer(weight)), site.name
        assert requantize(quantizer, weight, bits=32) is weight


@pytest.mark.sample(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change", [{"resize": times(0.8)}, {"bits": 5}, {"bits": 2, "steps_from": "mse"}], ids=str
)
def test_every_change_is_undone_bit_for_bit_also_after_an_error(kind, change):
    net = net_of(kind)
    (_, sites), before, expected = weight_sites(net, tiny.SIZE), state(net), tiny.logits(net)
    assert len(sites) == sum(site.is_weight for site in qat.iter_quantizers(net))
    assert not all_float(sites)
    with requantize_weights(sites):
        assert torch.equal(tiny.logits(net), expected)
    with contextlib.suppress(KeyboardInterrupt), requantize_weights(sites, **change):
        assert not torch.equal(tiny.logits(net), expected)
        raise KeyboardInterrupt
    assert is_as_before(net, before)
    assert torch.equal(tiny.logits(net), expected)


@pytest.mark.parametrize(
    ("quantizer", "ratio", "expected"),
    [
        # Steps 0.5, codes -2..1: -0.3 / 0.5 rounds to -1; 0.6 is clamped to 0.5.
        (lsq(0.25, 0.5), 2.0, [-1.0, -0.5, 0.0, 0.5]),
        # Steps 0.125: all but 0.1 are clamped to -0.25 and 0.125.
        (lsq(0.25, 0.5), 0.5, [-0.25, -0.25, 0.125, 0.125]),
        # Scale 2 * mean = 1, levels -0.75, -0.25, 0.25, 0.75; half of it: +-0.125, +-0.375.
        (StatsQ(spec("statsq")), 1.0, [-0.75, -0.25, 0.25, 0.75]),
        (StatsQ(spec("statsq")), 0.5, [-0.375, -0.375, 0.125, 0.375]),
        # Codes 0..3, zero point 2: levels -1, -0.5, 0, 0.5.
        (affine([0.25, 0.5], [2.0, 2.0]), 2.0, [-1.0, -0.5, 0.0, 0.5]),
        (affine([0.25, 0.5], [2.0, 2.0]), 1.0, [-0.5, -0.25, 0.0, 0.25]),
        # Codes -2..1 of steps 2 * 1.0 / 3, made half as long.
        (DynamicMinMax(spec("minmax")), 0.5, pytest.approx([-2 / 3, -1 / 3, 0.0, 1 / 3])),
    ],
)
def test_step_sizes_change_and_the_range_of_codes_stays(quantizer, ratio, expected):
    """In the second row all is twice as large."""
    small, large = requantize(
        quantizer, torch.tensor([ROW, ROW]) * torch.tensor([[1.0], [2.0]]), resize=times(ratio)
    )
    assert small.tolist() == expected
    assert torch.equal(large, 2 * small)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("kind", ["ofq4", "minmax", "lsq4"])
@torch.no_grad()
def test_another_width_in_training_is_what_the_quantizer_would_start_with(kind, bits):
    for site, weight, quantizer in sites_of(net_of(kind)):
        if (
            isinstance(site.quantizer, StatsQ | DynamicMinMax | LSQ)
            and bits != site.quantizer.spec.bits
        ):
            fresh = type(site.quantizer)(
                QuantSpec("weight", site.quantizer.spec.quantizer, bits, axis=site.quantizer.axis)
            )
            fresh.allocate(weight.shape, weight.device)
            fresh.calibrate(weight, {})
            assert torch.equal(requantize(quantizer, weight, bits=bits), fresh(weight))


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"weight_observer": "omse", "bias_correction": True},
        {"weight_observer": "mse", "weight_signed": True},
    ],
)
@torch.no_grad()
def test_another_width_of_ptq_is_what_calibration_would_have_given(knobs):
    for (_, weight, quantizer), (theirs, _, _) in zip(
        sites_of(ptq(bits=4, **knobs)), sites_of(ptq(bits=3, **knobs)), strict=True
    ):
        assert torch.equal(requantize(quantizer, weight, bits=3), theirs.quantizer(weight))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 1.0),
        (1.4142, 1.0),
        (1.4143, 2.0),
        (0.75, 1.0),
        (0.7071, 0.5),
        (0.70710677, 0.5),
        (1.41421354, 1.0),
        (3.0, 4.0),
        (2.0**-40, 2.0**-40),
        (0.0, 0.0),
        (1e-3, 2.0**-10),
    ],
)
def test_powers_of_two(value, expected):
    assert nearest_power_of_two(torch.tensor([value])).item() == expected


def test_bias_correction_stays_under_a_change():
    for site, weight, quantizer in sites_of(net_of("corrected")):
        found, rows = (
            requantize(quantizer, weight, resize=times(1.3)).flatten(1),
            weight.flatten(1),
        )
        assert_close(found.mean(1), rows.mean(1), rtol=0, atol=1e-5, msg=site.name)
        assert_close(found.std(1), rows.std(1), rtol=1e-4, atol=1e-5, msg=site.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    weight = torch.rand(1, 4, dtype=dtype)
    assert requantize(lsq(0.25), weight, resize=times(1.1)).dtype == dtype


def test_a_float_net_has_a_twin_that_shares_its_tensors():
    net = tiny.vit()
    before, parameters, expected = state(net), tiny.parameters(net), tiny.logits(net)
    twin, sites = weight_sites(net, tiny.SIZE)
    assert all_float(sites)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in net.parameters()}
    assert torch.equal(tiny.logits(twin), expected)
    with requantize_weights(sites, bits=2):
        assert not torch.equal(tiny.logits(twin), expected)
        assert torch.equal(tiny.logits(net), expected)
    assert is_as_before(net, before)
    assert tiny.parameters(net) == parameters
    assert not hasattr(net, "qat_conversion")
    places = {site.name: site.place for site in sites}
    assert (places["patch_embed.proj"], places["head"], places["blocks.0.attn.qkv"]) == (
        "stem",
        "head",
        "block",
    )


@pytest.mark.parametrize(
    ("axis", "expected"),
    [(0, [[-1.0, 0.0, 0.5], [-6.0, 0.0, 3.0]]), (None, [[0.0, 0.0, 0.0], [-6.0, 0.0, 3.0]])],
)
def test_float_weights_have_step_sizes_per_channel_or_tensor(axis, expected):
    # Symmetric codes -2..1 on ranges of 0.75 and 4.5, halved: steps 0.5 and 3, or 3 for both.
    weight = torch.tensor([[-0.75, 0.2, 0.7], [-4.5, 1.0, 4.0]])
    _, sites = weight_sites(tiny.vit(), tiny.SIZE, axis)
    assert requantize(sites[0].requantizer, weight, bits=2).tolist() == expected


class Doubled(StatsQ):
    """Derived from one of ours, and does something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_quantizer_that_is_not_known_is_left_alone(caplog):
    net = tiny.quantized(
        "ofq_noqkr", bits=2, overrides={"blocks.0.*": {"weight_quantizer": f"{__name__}:Doubled"}}
    )
    _, sites = weight_sites(net, tiny.SIZE)
    assert len(sites) == 6
    assert not any(site.name.startswith("blocks.0.") for site in sites)
    assert (
        "blocks.0.mlp.fc1.weight_quantizer: this quantizer has no uniform grid; the weight is left unchanged"
        in caplog.text
    )
