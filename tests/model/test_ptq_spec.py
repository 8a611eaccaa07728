"""Recipes of post-training quantization. Oracle: the table of FQ-ViT's settings, and one message per wrong knob."""

import dataclasses

import pytest

import qat
from qat.model.ptq_spec import PtqRecipe
from qat.spec import OUTPUT_ROLES, ROLES
from tests.errors import usage_error

WRONG = [
    ({"name": "fp"}, "ptq.name='fp': must be another name"),
    ({"rule_bits": "all"}, "ptq.rule_bits='all': must be one of both, weights"),
    ({"bits": 9}, "ptq.bits=9: must be an integer"),
    ({"placement": "outputs"}, "ptq.placement='outputs': must be one of inputs, fqvit"),
    (
        {"weight_observer": "ptf"},
        "ptq.weight_observer='ptf': must be one of minmax, percentile, omse, mse, mse_ends, ema",
    ),
    (
        {"residual_observer": "max"},
        "ptq.residual_observer='max': must be one of minmax, percentile, omse, mse, mse_ends, ptf, ema",
    ),
    (
        {"act_observer": "ptf"},
        "ptq.act_observer='ptf': must be one of minmax, percentile, omse, mse, mse_ends, ema",
    ),
    (
        {"layernorm": "integer", "placement": "inputs"},
        "ptq.layernorm='integer': needs affine quantizers on both sides of a norm",
    ),
    (
        {"overrides": {"head": {"placement": "inputs"}}},
        r"ptq.overrides\['head'\]={'placement': 'inputs'}: must be {setting: value} with settings among act_bits",
    ),
    ({"overrides": {"head": {"bits": 99}}}, r"ptq.overrides\['head'\]: ptq.bits=99: must be"),
]


@pytest.mark.parametrize(("knobs", "message"), WRONG, ids=[str(k) for k, _ in WRONG])
def test_wrong_knobs_are_named(knobs, message):
    with usage_error(message):
        qat.PtqRecipe(**knobs)


def test_none_follows_another_knob():
    made = PtqRecipe(bits=4, act_bits=6, act_observer="ema")
    assert (made.stem_bits, made.head_bits, made.softmax_bits) == (4, 4, 6)
    assert (made.residual_observer, made.softmax_quantizer) == ("ema", "affine")
    assert PtqRecipe(bits=4, act_bits=None).act_bits == 4


def test_weights_have_a_scale_per_output_channel_and_activations_one():
    made = PtqRecipe(
        bits=4, weight_observer="omse", act_observer="percentile", residual_observer="ptf"
    )
    assert all(
        (made.weight_spec(p).bits, made.weight_spec(p).axis) == (4, 0)
        for p in ("stem", "block", "head")
    )
    for role in {*ROLES, *OUTPUT_ROLES} - {"weight", "qk"}:
        spec = made.act_spec(role, "block")
        expected = (-1, "ptf") if role == "residual" else (None, "percentile")
        assert (spec.bits, spec.axis, spec.observer, spec.offsets) == (8, *expected, "none")


def test_specs_that_differ_in_the_observer_are_equal():
    # So that scales are taken over wherever the grids agree.
    a, b = (PtqRecipe(weight_observer=o).weight_spec("block") for o in ("minmax", "omse"))
    assert a == b
    assert a != dataclasses.replace(a, bias_correction=True)
