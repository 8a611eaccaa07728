"""Weights on other grids, for a while. Oracle: the quantizers themselves where nothing is changed, else values worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.analysis.grids import grid_of
from qat.analysis.requantize import WeightChange, half_up, nearest_power_of_two, requantized, stochastic, weight_sites
from qat.functional.statsq import statsq_with_scale
from qat.quantizers import LSQ, Affine, DynamicMinMax, Float, StatsQ
from qat.spec import QuantSpec
from tests import tiny
from tests.analysis.common import KINDS, is_as_before, net_of, ptq, state

ROUNDINGS = ("nearest", "half_up", "floor", "stochastic")


def sites_of(net):
    """(site, latent weight, grid) of every quantized weight."""
    return [(s, s.latent().detach(), grid_of(s.quantizer, 0)) for s in qat.iter_quantizers(net) if s.is_weight]


def lsq(step, bits=2):
    quantizer = LSQ(QuantSpec("weight", "lsq", bits, axis=0))
    quantizer.scale = torch.nn.Parameter(torch.tensor(step))
    return grid_of(quantizer, None)


def statsq(bits=2):
    return grid_of(StatsQ(QuantSpec("weight", "statsq", bits, axis=0)), None)


def affine(scale, zero_point, bits=2, signed=False, **more):
    quantizer = Affine(QuantSpec("weight", "affine", bits, signed=signed, axis=0, **more))
    quantizer.scale, quantizer.zero_point = torch.tensor(scale), torch.tensor(zero_point)
    return grid_of(quantizer, None)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_change_is_the_quantizer_bit_for_bit(kind):
    for site, weight, grid in sites_of(net_of(kind)):
        expected = site.quantizer(weight)
        for change in (WeightChange(), WeightChange(bits=grid.bits, ratio=1.0, seed=5)):
            assert torch.equal(requantized(grid, weight, change), expected), site.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_without_a_change_has_the_same_logits(kind):
    net = net_of(kind)
    weights, before, expected = weight_sites(net, tiny.SIZE), state(net), tiny.logits(net)
    assert len(weights.sites) == sum(site.is_weight for site in qat.iter_quantizers(net))
    assert (weights.left_alone, weights.is_float) == ((), False)
    with weights.changed(WeightChange(), weights.sites):
        assert torch.equal(tiny.logits(net), expected)
    with weights.changed(WeightChange(ratio=0.8), weights.sites):
        assert not torch.equal(tiny.logits(net), expected)
    assert is_as_before(net, before)
    assert torch.equal(tiny.logits(net), expected)


@pytest.mark.parametrize("kind", ["ofq2", "lsq2", "corrected"])
@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"bits": 32},
        {"steps": "power_of_two"},
        {"rounding": "floor"},
        {"rounding": "stochastic"},
        {"steps_from": "mse"},
        {"bits": 5, "steps_from": "percentile", "percentile": 0.9},
    ],
    ids=str,
)
def test_every_change_is_undone_when_it_fails_too(kind, change):
    net = net_of(kind)
    weights, before, expected = weight_sites(net, tiny.SIZE), state(net), tiny.logits(net)

    def interrupted():
        with weights.changed(WeightChange(**change), weights.sites):
            assert not torch.equal(tiny.logits(net), expected)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert is_as_before(net, before)
    assert torch.equal(tiny.logits(net), expected)


@pytest.mark.parametrize(
    ("grid", "ratio", "expected"),
    [
        # Steps 0.5, codes -2..1: -0.3 / 0.5 rounds to -1; 0.6 is clamped to 0.5.
        (lsq([0.25]), 2.0, [-1.0, -0.5, 0.0, 0.5]),
        # Steps 0.125: all but 0.1 are clamped to -0.25 and 0.125.
        (lsq([0.25]), 0.5, [-0.25, -0.25, 0.125, 0.125]),
        # Scale 2 * mean = 1, levels -0.75, -0.25, 0.25, 0.75.
        (statsq(), 1.0, [-0.75, -0.25, 0.25, 0.75]),
        # Half of it: levels +-0.125, +-0.375.
        (statsq(), 0.5, [-0.375, -0.375, 0.125, 0.375]),
        # Codes 0..3, zero point 2: levels -1, -0.5, 0, 0.5.
        (affine([0.25], [2.0]), 2.0, [-1.0, -0.5, 0.0, 0.5]),
        (affine([0.25], [2.0]), 1.0, [-0.5, -0.25, 0.0, 0.25]),
    ],
)
def test_steps_change_and_the_range_of_codes_stays(grid, ratio, expected):
    weight = torch.tensor([[-1.0, -0.3, 0.1, 0.6]])
    assert requantized(grid, weight, WeightChange(ratio=ratio)).tolist() == [expected]


def by_function(quantizer, weight, scale_to):
    """The function of `qat.functional` behind a quantizer, on scales that `scale_to` makes of its own."""
    spec = quantizer.spec
    if isinstance(quantizer, StatsQ):
        return statsq_with_scale(weight, scale_to(qat.functional.statsq_scale(weight)), spec.bits)
    if isinstance(quantizer, LSQ):
        return qat.functional.lsq(weight, scale_to(quantizer.scale), spec.qmin, spec.qmax, quantizer.axis)
    if isinstance(quantizer, Affine):
        bounds = (quantizer.qmin, quantizer.qmax)
        return qat.functional.fake_quantize_affine(weight, scale_to(quantizer.scale), quantizer.zero_point, *bounds, quantizer.axis)
    scale, zero = qat.functional.affine_scale(weight, spec.bits, signed=True, axis=quantizer.axis)
    return qat.functional.fake_quantize_affine(weight, scale_to(scale), zero, spec.qmin, spec.qmax, quantizer.axis)


@pytest.mark.parametrize("kind", ["ofq2", "ofq4", "lsq4", "minmax", "stored", "ptq4", "signed"])
@pytest.mark.parametrize(
    ("change", "scale_to"),
    [
        ({"ratio": 0.7}, lambda scale: 0.7 * scale),
        ({"ratio": 1.3}, lambda scale: 1.3 * scale),
        ({"steps": "power_of_two"}, lambda scale: scale.double().log2().round().exp2().float()),
        ({"steps": "power_of_two", "ratio": 1.3}, lambda scale: (1.3 * scale).double().log2().round().exp2().float()),
    ],
    ids=["0.7", "1.3", "powers", "1.3 to powers"],
)
@torch.no_grad()
def test_other_steps_are_those_of_the_function_on_other_scales(kind, change, scale_to):
    for site, weight, grid in sites_of(net_of(kind)):
        found = requantized(grid, weight, WeightChange(**change))
        assert torch.equal(found, by_function(site.quantizer, weight, scale_to)), site.name


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@torch.no_grad()
def test_another_width_of_statsq_and_minmax_is_their_own_formula(bits):
    for kind in ("ofq4", "minmax"):
        for site, weight, grid in sites_of(net_of(kind)):
            spec = QuantSpec("weight", site.quantizer.spec.quantizer, bits, axis=site.quantizer.axis)
            if isinstance(site.quantizer, StatsQ | DynamicMinMax):
                expected = type(site.quantizer)(spec)(weight)
                assert torch.equal(requantized(grid, weight, WeightChange(bits=bits)), expected)


@pytest.mark.parametrize("bits", [2, 4])
@torch.no_grad()
def test_another_width_of_lsq_starts_learning_anew(bits):
    for site, weight, grid in sites_of(tiny.quantized("lsq", bits=3)):
        if site.quantizer.spec.bits != bits:
            fresh = LSQ(QuantSpec("weight", "lsq", bits, axis=0))
            fresh.allocate(weight.shape, weight.device)
            fresh.calibrate(weight, {})
            assert torch.equal(requantized(grid, weight, WeightChange(bits=bits)), fresh(weight))


@pytest.mark.parametrize(
    "knobs", [{}, {"weight_observer": "omse", "bias_correction": True}, {"weight_observer": "mse", "weight_signed": True}]
)
@torch.no_grad()
def test_another_width_of_ptq_is_what_calibration_would_have_given(knobs):
    for (_, weight, grid), (theirs, _, _) in zip(sites_of(ptq(bits=4, **knobs)), sites_of(ptq(bits=3, **knobs)), strict=True):
        assert torch.equal(requantized(grid, weight, WeightChange(bits=3)), theirs.quantizer(weight))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_32_bits_are_the_float_weight(kind):
    for _, weight, grid in sites_of(net_of(kind)):
        assert requantized(grid, weight, WeightChange(bits=32)) is weight


@torch.no_grad()
def test_ranges_by_hand():
    weight = torch.tensor([[-1.0, -0.5, 0.3, 3.0]])
    change = {"bits": 2}
    # Symmetric codes -2..1 on a range of 3: step 2.
    assert requantized(lsq([9.0]), weight, WeightChange(steps_from="minmax", **change)).tolist() == [[0.0, 0.0, 0.0, 2.0]]
    # Unsigned codes 0..3 on -1..3: step 4/3, zero point 1.
    four_thirds = 4 / 3
    found = requantized(affine([9.0], [0.0]), weight, WeightChange(steps_from="minmax", **change))
    assert_close(found, torch.tensor([[-four_thirds, 0.0, 0.0, 2 * four_thirds]]))
    # Half steps on a scale of 3: levels +-0.75, +-2.25.
    assert requantized(statsq(), weight, WeightChange(steps_from="minmax", **change)).tolist() == [[-0.75, -0.75, 0.75, 2.25]]
    # Quantiles 1/3 and 2/3 are -0.5 and 0.3: scale 0.5, levels +-0.125, +-0.375.
    found = requantized(statsq(), weight, WeightChange(steps_from="percentile", percentile=2 / 3, **change))
    assert_close(found, torch.tensor([[-0.375, -0.375, 0.375, 0.375]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["ofq2", "lsq2", "minmax", "ptq4", "signed"])
@torch.no_grad()
def test_least_error_is_never_worse_than_the_whole_range(kind):
    for _, weight, grid in sites_of(net_of(kind)):
        errors = {
            rule: (requantized(grid, weight, WeightChange(bits=2, steps_from=rule)) - weight).square().flatten(1).mean(1)
            for rule in ("minmax", "mse")
        }
        assert (errors["mse"] <= errors["minmax"] * (1 + 1e-6)).all()
        assert errors["mse"].sum() < errors["minmax"].sum()


@torch.no_grad()
def test_least_error_of_an_affine_grid_is_that_of_affine_scale():
    for _, weight, grid in sites_of(net_of("signed")):
        scale, zero = qat.functional.affine_scale(weight, 3, signed=True, axis=0, method="mse")
        expected = qat.functional.fake_quantize_affine(weight, scale, zero, -4, 3, 0)
        assert torch.equal(requantized(grid, weight, WeightChange(bits=3, steps_from="mse")), expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, 1.0), (1.4142, 1.0), (1.4143, 2.0), (0.75, 1.0), (0.7071, 0.5), (3.0, 4.0), (2.0**-40, 2.0**-40), (0.0, 0.0), (1e-3, 2.0**-10)],
)
def test_powers_of_two(value, expected):
    assert nearest_power_of_two(torch.tensor([value])).item() == expected


def test_powers_of_two_are_those_of_log2():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)).mul(20).sub(10).exp2()
    assert torch.equal(nearest_power_of_two(x), x.double().log2().round().exp2().float())


def test_roundings_by_hand():
    x = torch.tensor([-1.5, -0.5, -0.4, 0.0, 0.49999997, 0.5, 1.5, 2.5, 2.6])
    assert half_up(x).tolist() == [-1, 0, 0, 0, 0, 1, 2, 3, 3]
    weight = torch.tensor([[-0.5, -0.25, 0.375, 0.25]])
    grid = lsq([0.25], bits=3)
    found = {how: requantized(grid, weight, WeightChange(rounding=how)).tolist()[0] for how in ROUNDINGS if how != "stochastic"}
    assert found == {"nearest": [-0.5, -0.25, 0.5, 0.25], "half_up": [-0.5, -0.25, 0.5, 0.25], "floor": [-0.5, -0.25, 0.25, 0.25]}
    halves = torch.tensor([[0.125, 0.375, -0.125, -0.375]])
    assert requantized(grid, halves, WeightChange()).tolist() == [[0.0, 0.5, 0.0, -0.5]]
    assert requantized(grid, halves, WeightChange(rounding="half_up")).tolist() == [[0.25, 0.5, 0.0, -0.25]]


@pytest.mark.parametrize("kind", ["ofq2", "ofq8", "lsq2", "ptq4", "stored"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@torch.no_grad()
def test_no_rounding_leaves_the_range(kind, rounding):
    for _, weight, grid in sites_of(net_of(kind))[::4]:
        onto = grid.own(weight, grid.bits)
        levels = [grid.fake_quantize(torch.full_like(weight, far), onto) for far in (-1e6, 1e6)]
        # Steps that are far too small: most of the weight is beyond the outermost levels.
        found = requantized(grid, weight, WeightChange(rounding=rounding, ratio=2.0**-7))
        assert (found >= 2.0**-7 * levels[0]).all()
        assert (found <= 2.0**-7 * levels[1]).all()
        assert (found == 2.0**-7 * levels[0]).any()


def test_stochastic_rounding_keeps_whole_numbers_and_the_mean():
    assert stochastic(torch.tensor([-2.0, 0.0, 7.0]), 0).tolist() == [-2.0, 0.0, 7.0]
    found = stochastic(torch.full((40_000,), -1.25), 0)
    assert set(found.tolist()) == {-2.0, -1.0}
    # Four standard deviations of a mean of 40,000.
    assert abs(found.mean().item() + 1.25) < 4 * math.sqrt(0.25 * 0.75 / 40_000)
    assert torch.equal(found, stochastic(torch.full((40_000,), -1.25), 0))
    assert not torch.equal(found, stochastic(torch.full((40_000,), -1.25), 1))


@torch.no_grad()
def test_stochastic_draws_depend_on_seed_and_weight_alone():
    net = net_of("ofq2")
    weights = weight_sites(net, tiny.SIZE)
    found = []
    for seed in (0, 0, 1):
        with weights.changed(WeightChange(rounding="stochastic", seed=seed), weights.sites):
            found.append(tiny.logits(net))
            assert torch.equal(tiny.logits(net), found[-1])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    weight = torch.full((4, 50), 0.1)
    assert not torch.equal(*(requantized(lsq([0.25]), weight, WeightChange(rounding="stochastic"), number=n) for n in (0, 1)))


@torch.no_grad()
def test_steps_are_searched_for_once(monkeypatch):
    from qat.analysis import requantize as module

    net, calls = net_of("ofq2"), []
    weights = weight_sites(net, tiny.SIZE)
    monkeypatch.setattr(module, "derived", lambda *args, made=module.derived: calls.append(args[3]) or made(*args))
    found = []
    for change in (
        {"steps_from": "mse"},
        {"steps_from": "mse", "ratio": 1.5},
        {"steps_from": "mse", "ratio": 1.5},
        {"bits": 3, "steps_from": "mse"},
    ):
        with weights.changed(WeightChange(**change), weights.sites):
            found.append(tiny.logits(net))
    assert calls == ["mse"] * 2 * len(weights.sites)
    assert torch.equal(found[1], found[2])
    fresh = weight_sites(net, tiny.SIZE)
    for change, expected in (({"steps_from": "mse", "ratio": 1.5}, found[1]), ({"bits": 3, "steps_from": "mse"}, found[3])):
        with fresh.changed(WeightChange(**change), fresh.sites):
            assert torch.equal(tiny.logits(net), expected)


def test_bias_correction_stays_under_a_change():
    for site, weight, grid in sites_of(net_of("corrected")):
        found = requantized(grid, weight, WeightChange(ratio=1.3)).flatten(1)
        rows = weight.flatten(1)
        assert_close(found.mean(1), rows.mean(1), rtol=0, atol=1e-5, msg=site.name)
        assert_close(found.std(1), rows.std(1), rtol=1e-4, atol=1e-5, msg=site.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    assert requantized(lsq([0.25]), torch.rand(3, 4, dtype=dtype), WeightChange(ratio=1.1)).dtype == dtype


def test_a_float_net_has_a_twin_that_shares_its_tensors():
    net = tiny.vit()
    before, parameters, expected = state(net), tiny.parameters(net), tiny.logits(net)
    weights = weight_sites(net, tiny.SIZE)
    assert weights.is_float
    assert weights.net is not net
    assert {id(p) for p in weights.net.parameters()} == {id(p) for p in net.parameters()}
    assert torch.equal(tiny.logits(weights.net), expected)
    with weights.changed(WeightChange(bits=2), weights.sites):
        assert not torch.equal(tiny.logits(weights.net), expected)
        assert torch.equal(tiny.logits(net), expected)
    assert is_as_before(net, before)
    assert tiny.parameters(net) == parameters
    assert not hasattr(net, "qat_conversion")
    places = {site.name: site.place for site in weights.sites}
    assert (places["patch_embed.proj"], places["head"], places["blocks.0.attn.qkv"]) == ("stem", "head", "block")


@pytest.mark.parametrize(("axis", "expected"), [(0, [[-1.0, 0.0, 0.5], [-6.0, 0.0, 3.0]]), (None, [[0.0, 0.0, 0.0], [-6.0, 0.0, 3.0]])])
def test_float_weights_have_steps_per_channel_or_tensor(axis, expected):
    # Symmetric codes -2..1 on ranges of 0.75 and 4.5, halved: steps 0.5 and 3, or 3 for both.
    weight = torch.tensor([[-0.75, 0.2, 0.7], [-4.5, 1.0, 4.0]])
    found = requantized(grid_of(Float(QuantSpec("weight", "float", 32)), axis), weight, WeightChange(bits=2))
    assert found.tolist() == expected


class Doubled(StatsQ):
    """Derived from one of ours, and does something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Unheard(Float):
    """Of a class that no grid is known for, since it is float no more."""

    def forward(self, x):
        return x.sign()


@pytest.mark.parametrize("name", ["Doubled", "Unheard"])
def test_a_quantizer_that_is_not_known_is_left_alone(name):
    net = tiny.quantized("ofq_noqkr", bits=2, overrides={"blocks.0.*": {"weight_quantizer": f"{__name__}:{name}"}})
    weights, expected = weight_sites(net, tiny.SIZE), tiny.logits(net)
    assert len(weights.left_alone) == 4
    assert all(name.startswith("blocks.0.") for name in weights.left_alone)
    assert len(weights.sites) == 6
    assert not weights.is_float
    with weights.changed(WeightChange(ratio=0.5), weights.sites):
        assert not torch.equal(tiny.logits(net), expected)
    assert torch.equal(tiny.logits(net), expected)
