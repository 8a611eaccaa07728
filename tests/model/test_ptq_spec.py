"""Recipes of post-training quantization. Oracle: the table of FQ-ViT's settings, and one message per wrong knob."""

import dataclasses

import pytest

import qat
from qat.model.ptq_spec import PtqRecipe, recipe_from
from qat.spec import OUTPUT_ROLES, ROLES

WRONG = [
    ({"bits": 9}, "ptq.bits=9: must be an integer from 2 to 8"),
    ({"bits": "4"}, "ptq.bits='4': must be"),
    ({"act_bits": 1}, "ptq.act_bits=1: must be"),
    ({"softmax_bits": 16}, "ptq.softmax_bits=16: must be"),
    ({"head_bits": 32}, "ptq.head_bits=32: must be"),
    ({"placement": "outputs"}, "ptq.placement='outputs': must be one of inputs, fqvit"),
    ({"attention": "qkr"}, "ptq.attention='qkr': must be one of standard, float"),
    ({"weight_observer": "max"}, "ptq.weight_observer='max': must be one of minmax, percentile, omse, mse, ptf, ema"),
    ({"act_observer": "ptf"}, "ptq.act_observer='ptf': must be one of minmax, percentile, omse, mse, ema"),
    ({"weight_quantizer": "lsq"}, "ptq.weight_quantizer='lsq': must be one of affine, float"),
    ({"softmax_quantizer": "log3"}, "ptq.softmax_quantizer='log3': must be one of affine, log2, float"),
    ({"weight_scales": "row"}, "ptq.weight_scales='row': must be one of channel, tensor"),
    ({"act_scales": "row"}, "ptq.act_scales='row': must be one of tensor, token, channel"),
    ({"steps": "relative"}, "ptq.steps='relative': must be 'absolute'; it is a knob of training"),
    ({"fits_int8": True}, "ptq.fits_int8=True: must be False; it is a knob of training"),
    ({"bias_correction": "yes"}, "ptq.bias_correction='yes': must be"),
    ({"layernorm": "int"}, "ptq.layernorm='int': must be one of float, integer"),
    ({"layernorm": "integer", "placement": "inputs"}, "ptq.layernorm='integer': needs the scales on both sides of a norm"),
    (
        {"overrides": {"head": {"placement": "inputs"}}},
        r"ptq.overrides\['head'\]={'placement': 'inputs'}: its knobs must be among act_bits",
    ),
    ({"overrides": {"head": {"bits": 99}}}, r"ptq.overrides\['head'\]: ptq.bits=99: must be"),
]


@pytest.mark.parametrize(("knobs", "message"), WRONG, ids=[str(k) for k, _ in WRONG])
def test_wrong_knobs_are_named(knobs, message):
    with pytest.raises(qat.UsageError, match=message) as caught:
        qat.PtqRecipe(**knobs)
    assert "\n" not in str(caught.value)


def test_none_follows_another_knob():
    made = PtqRecipe(bits=4, act_bits=6, act_observer="ema")
    assert (made.stem_bits, made.head_bits, made.softmax_bits) == (4, 4, 6)
    assert (made.residual_observer, made.softmax_quantizer) == ("ema", "affine")
    assert PtqRecipe(bits=4, act_bits=None).act_bits == 4


@pytest.mark.parametrize("made", [PtqRecipe(bits=3, residual_observer="ptf", overrides={"head": {"bits": 8}}), qat.recipe("ofq", bits=2)])
def test_plain_data_gives_the_same_recipe_of_the_same_kind(made):
    again = recipe_from(made.to_dict())
    assert (type(again), again) == (type(made), made)


def test_a_knob_of_neither_kind_is_refused():
    with pytest.raises(TypeError, match="colour"):
        recipe_from({"name": "ptq", "placement": "fqvit", "colour": "red"})


def test_weights_have_a_scale_per_output_channel_and_activations_one():
    made = PtqRecipe(bits=4, weight_observer="omse", act_observer="percentile", residual_observer="ptf")
    assert all((made.weight_spec(p).bits, made.weight_spec(p).axis) == (4, 0) for p in ("stem", "block", "head"))
    for role in {*ROLES, *OUTPUT_ROLES} - {"weight", "qk"}:
        spec = made.act_spec(role, "block")
        expected = (-1, "ptf") if role == "residual" else (None, "percentile")
        assert (spec.bits, spec.axis, spec.observer, spec.offsets) == (8, *expected, "none")


def test_attention_may_stay_float():
    made = PtqRecipe(attention="float")
    assert {made.act_spec(r, "block").quantizer for r in ("q", "k", "v", "qkv", "scores", "probs")} == {"float"}
    assert made.act_spec("input", "block").quantizer == "affine"


def test_specs_that_differ_in_the_observer_are_equal():
    # So that scales are taken over wherever the grids agree.
    a, b = (PtqRecipe(weight_observer=o).weight_spec("block") for o in ("minmax", "omse"))
    assert a == b
    assert a != dataclasses.replace(a, bias_correction=True)
