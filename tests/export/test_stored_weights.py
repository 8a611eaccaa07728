"""How codes are stored in ONNX. Oracle: the frozen weight, bit for bit."""

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.export.codes import OPSETS, store_weight
from qat.model.frozen import FrozenWeight
from tests import tiny
from tests.model.frozen.test_freeze import made


def weights(recipe):
    return {
        name: module
        for name, module in qat.freeze(made(recipe)).named_modules()
        if isinstance(module, FrozenWeight)
    }


STATSQ = {  # bits: type, lowest and highest stored number, are they doubled, is half a step added
    2: (4, -3, 3, False, False),
    3: (4, -7, 7, False, False),
    4: (4, -8, 7, True, False),
    5: (8, -31, 31, False, False),
    7: (8, -127, 127, False, False),
    8: (8, -128, 127, False, True),
}


@pytest.mark.parametrize("bits", STATSQ)
def test_statsq(bits):
    weight = weights(qat.recipe("ofq", bits=bits))["blocks.0.mlp.fc2.weight_quantizer"]
    width, lowest, highest, doubled, added = STATSQ[bits]
    form = store_weight(weight)
    assert (form.width, form.is_doubled, form.constant is not None) == (width, doubled, added)
    assert lowest <= form.codes.min() <= form.codes.max() <= highest
    assert form.centred_factors.abs().max() <= 128
    assert_close(form.value, weight(), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("lowest", "stored"), [(4, [-3, -1, 1, 3]), (2, [-2, -1, 0, 1]), (8, [-3, -1, 1, 3])]
)
def test_two_bits(lowest, stored):
    weight = weights(qat.recipe("ofq", bits=2))["blocks.0.mlp.fc2.weight_quantizer"]
    form = store_weight(weight, lowest)
    assert (form.width, form.constant, form.is_doubled) == (lowest, None, lowest == 2)
    assert form.codes.unique().tolist() == stored
    assert form.centred_factors.unique().tolist() == [-3, -1, 1, 3]
    assert torch.equal(form.value, weight())


@pytest.mark.parametrize(("bits", "width"), [(2, 4), (3, 4), (4, 4), (8, 8)])
def test_lsq_has_no_half_step(bits, width):
    for weight in weights(qat.recipe("lsq", bits=bits)).values():
        if weight.spec.bits == bits:
            form = store_weight(weight)
            assert (form.width, form.constant, form.zero_point) == (width, None, None)
            assert torch.equal(form.value, weight())


def test_ranges_with_a_zero_point():
    recipe = qat.PtqRecipe(bits=4, bias_correction=True)
    frozen = qat.freeze(tiny.fitted(tiny.vit(), tiny.images(), recipe))
    for module in frozen.modules():
        if isinstance(module, FrozenWeight):
            form = store_weight(module)
            assert form.width == 4
            assert -8 <= form.zero_point.min() <= form.zero_point.max() <= 7
            assert_close(form.value, module(), rtol=1e-6, atol=1e-8)


def test_the_opset_follows_from_the_types():
    for bits, lowest, opset in ((2, 2, 25), (2, 4, 21), (8, 4, 13)):
        forms = [
            store_weight(weight, lowest)
            for weight in weights(qat.recipe("ofq", bits=bits)).values()
        ]
        assert max(OPSETS[form.width] for form in forms) == opset


@pytest.mark.parametrize(
    ("bits", "code", "cpu"),
    [*((8, code, "any") for code in (64, -64, 65, -65, 127)), (8, 127, "fast"), (4, 7, "any")],
)
def test_codes_are_int8_if_two_products_with_uint8_fit_16_bits(bits, code, cpu):
    weight = weights(qat.recipe("lsq", bits=bits))["blocks.0.mlp.fc2.weight_quantizer"]
    weight.stored = torch.zeros_like(weight.stored)
    weight.stored[0, 0] = code
    fits = cpu == "fast" or 2 * 255 * abs(code) < 2**15
    form = store_weight(weight, cpu=cpu)
    assert form.codes.dtype == (torch.int8 if fits else torch.uint8)
    assert form.zero_point is None or form.zero_point.dtype == form.codes.dtype
    assert_close(form.value, weight())
