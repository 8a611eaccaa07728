"""Quantizers `fp8` and `fp8_held`. Oracle: `qat.functional.fp8` with max / 448."""

import pytest
import torch

import qat
from qat.functional import fp8, fp8_codes
from tests import tiny
from tests.quantizers.common import allocated, build
from tests.quantizers.test_float_formats import FP8, ptq, quantized
from tests.tiny import randn


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
    assert quantizer.num_stored_scales == 1
    quantizer(batches[0]).sum().backward() if name == "fp8" else None
    learned = [p.requires_grad for p in quantizer.parameters()]
    assert learned == [name == "fp8"]


@pytest.mark.parametrize("name", FP8)
def test_what_is_quantized(name):
    _, knobs = FP8[name]
    specs = [site.quantizer.spec for site in tiny.sites(quantized(name)).values()]
    act = knobs.get("act_quantizer", "fp8")
    places = {(s.role in {"weight", "qk"}, s.quantizer, s.bits, s.axis) for s in specs}
    assert places == {(True, "fp8", 8, 0), (False, act, 8, None)}
    roles = {spec.role for spec in specs}
    assert ({"v", "probs", "k"} <= roles) == ("attention" in knobs)


def test_the_answers_are_near_those_of_the_float_model():
    """Three bits of mantissa: a share of 2^-4 of each factor at most."""
    expected = tiny.logits(tiny.vit())
    apart = (tiny.logits(tiny.quantized("fp8")) - expected).abs().max() / expected.abs().max()
    assert 0.001 < apart < 0.15


def test_post_training_calibrates_from_the_float_model():
    net = tiny.convert(tiny.vit(), ptq("fp8"))
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


def test_the_grid_has_the_smallest_scale_that_codes_have():
    x = randn(1, 4, 8)
    quantizer = allocated("fp8", x, bits=8, steps="absolute")
    quantizer.scale.data.fill_(-0.01)
    assert torch.equal(quantizer.grid(x).dequantize(quantizer.codes(x)), quantizer(x))
