"""Quantizers `fp8` and `fp8_held`. Oracle: `qat.functional.fp8` with max / 448."""

import pytest
import torch

import qat
from qat.callbacks.cga import CGA
from qat.callbacks.freezing import IterativeFreezing
from qat.callbacks.oscillation import Oscillation
from qat.functional import fp8, fp8_codes
from qat.losses import Dampening, Kure
from qat.quantizers import Fp8Grid
from tests import tiny
from tests.callbacks.fitting import fit, module
from tests.errors import usage_error
from tests.losses.common import step
from tests.quantizers.common import allocated, build, calibrated
from tests.tiny import randn

KNOBS = {
    "float attention": {},
    "standard": {"attention": "standard"},
    "qkr": {"attention": "qkr"},
    "held": {"act_quantizer": "fp8_held"},
}


@pytest.mark.parametrize(("axis", "shape"), [(0, (6, 5)), (0, (6, 3, 2, 2)), (None, (6, 5))])
def test_weights_have_the_scales_of_their_largest_values(axis, shape):
    quantizer, w = build("fp8", "weight", 8, axis=axis), randn(*shape).requires_grad_()
    rows = w.detach().flatten(1) if axis == 0 else w.detach().reshape(1, -1)
    scale = rows.abs().amax(1) / 448
    y = quantizer(w)
    assert torch.equal(y, fp8(w, scale, axis))
    assert torch.equal(quantizer.codes(w), fp8_codes(w, scale, axis))
    y.backward(torch.ones_like(y))
    assert torch.equal(w.grad, torch.ones_like(w))  # the largest value too
    assert not list(quantizer.state_dict())
    assert quantizer.grid() is None


@pytest.mark.parametrize("name", ["fp8", "fp8_held"])
@pytest.mark.parametrize("steps", ["relative", "absolute"])
def test_activations_have_the_scale_of_all_batches(name, steps):
    batches = [randn(2, 5, 8, seed=i) * (i + 1) / 1000 for i in (0, 2, 1)]
    quantizer, state = allocated(name, batches[0], bits=8, steps=steps), {}
    assert quantizer(batches[0]).isnan().all()
    for x in batches:
        quantizer.calibrate(x, state)
    scale = torch.stack([x.abs().max() for x in batches]).max() / 448
    assert quantizer.scale.item() == scale
    for x in batches:
        assert torch.equal(quantizer(x), fp8(x, quantizer.scale, None))
    assert quantizer.n_scales == 1
    quantizer(batches[0]).sum().backward() if name == "fp8" else None
    learned = [p.requires_grad for p in quantizer.parameters()]
    assert learned == [name == "fp8"]


@pytest.mark.parametrize("role", ["weight", "input"])
def test_the_grid(role):
    x = randn(4, 40)
    quantizer = calibrated("fp8", x, role, 8, axis=0 if role == "weight" else None)
    grid, codes = quantizer.grid(x), quantizer.codes(x)
    assert isinstance(grid, Fp8Grid)
    assert torch.equal(grid.dequantize(codes), quantizer(x))
    order = grid.in_order(codes)
    assert torch.equal(order, grid.to_code_coordinates(x).round().clamp(grid.qmin, grid.qmax))
    assert order.abs().max() == grid.qmax == 126
    low, high = grid.ends()
    assert low <= quantizer(x).min() < quantizer(x).max() <= high


@pytest.mark.parametrize("name", KNOBS)
def test_what_is_quantized(name):
    specs = [
        site.quantizer.spec for site in tiny.sites(tiny.quantized("fp8", **KNOBS[name])).values()
    ]
    act = KNOBS[name].get("act_quantizer", "fp8")
    places = {(s.role in {"weight", "qk"}, s.quantizer, s.bits, s.axis) for s in specs}
    assert places == {(True, "fp8", 8, 0), (False, act, 8, None)}
    roles = {spec.role for spec in specs}
    assert ({"v", "probs", "k"} <= roles) == ("attention" in KNOBS[name])


@pytest.mark.parametrize("name", KNOBS)
def test_a_training_step(name):
    net = tiny.quantized("fp8", **KNOBS[name]).train()
    net(tiny.images()).logsumexp(1).sum().backward()
    gradients = {
        name: p.grad
        for name, p in net.named_parameters()
        if p.requires_grad and "qk_bias" not in name
    }
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert any("quantizer" in key for key in gradients) == (name != "held")


def test_the_answers_are_near_those_of_the_float_model():
    """Three bits of mantissa: a share of 2^-4 of each factor at most."""
    expected = tiny.logits(tiny.vit())
    apart = (tiny.logits(tiny.quantized("fp8")) - expected).abs().max() / expected.abs().max()
    assert 0.001 < apart < 0.15


def test_post_training_calibrates_from_the_float_model():
    net = tiny.convert(tiny.vit(), qat.PtqRecipe(**PTQ))
    calibration = qat.ptq.calibrate(net, [tiny.images(4), tiny.images(4, seed=1)])
    assert calibration.images == 8
    float_net = tiny.convert(tiny.vit(), tiny.float_recipe("float"))
    seen = [
        tiny.watched(float_net, lambda n, i=i: tiny.logits(n, tiny.images(4, seed=i)))
        for i in (0, 1)
    ]
    for name, site in tiny.sites(net).items():
        if not site.is_weight and site.quantizer.spec.quantizer == "fp8":
            largest = max(run[name][0].abs().max() for run in seen)
            assert site.quantizer.scale.item() == pytest.approx(float(largest) / 448, rel=1e-5)
    trained = tiny.converted("fp8")
    copied, missing = qat.model.transfer.copy_scales(net, trained)
    assert (len(copied), missing) == (10, [])
    assert torch.equal(tiny.logits(trained), tiny.logits(net))


def test_regularizers():
    net = tiny.quantized("fp8")
    Kure()(step(net)).backward()
    weights = [s for n, s in tiny.sites(net).items() if s.is_weight and n.startswith("blocks")]
    assert all(site.owner.weight.grad.any() for site in weights)
    with usage_error("Dampening: max_bits=8: "):
        Dampening(max_bits=8)(step(net))


@pytest.mark.parametrize(
    ("callback", "setting"),
    [
        (IterativeFreezing(), "freeze"),
        (CGA(), "cga"),
        (Oscillation(max_bits=8), "oscillation.max_bits=8"),
    ],
)
def test_callbacks_that_need_steps(callback, setting):
    with usage_error(f"^callbacks.{setting}: this model has no "):
        fit(module(tiny.quantized("fp8")), callback)


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ({"bits": 4}, "quant.bits=4: must be 8 with fp8"),
        ({"act_bits": 4}, "quant.act_bits=4: must be 8 with fp8"),
        ({"head_bits": 4}, "quant.head_bits=4: must be 8 with fp8"),
        ({"offsets": True}, "quant.offsets=true: must be false with fp8"),
        ({"weight_quantizer": "fp8_held"}, "quant.weight_quantizer='fp8_held': must be one of "),
    ],
)
def test_recipes_that_cannot_be(knobs, line):
    with usage_error(f"^{line}"):
        qat.recipe("fp8", **knobs)


PTQ = {
    "weight_quantizer": "fp8",
    "act_quantizer": "fp8",
    "attention": "float",
    "placement": "inputs",
}


@pytest.mark.parametrize(
    ("setting", "value", "needed"),
    [
        ("bias_correction", True, False),
        ("method", "reconstruct", "calibrate"),
        ("placement", "fqvit", "inputs"),
        ("act_observer", "mse", "minmax"),
        ("act_scales", "token", "tensor"),
        ("weight_scales", "tensor", "channel"),
        ("bits", 4, 8),
        ("head_bits", 4, 8),
    ],
)
def test_post_training_that_cannot_be(setting, value, needed):
    with usage_error(f"^ptq.{setting}={value!r}: must be {needed} with fp8"):
        qat.PtqRecipe(**{**PTQ, setting: value})
