"""Specs and recipes. Oracle: the table of the paper's settings, and one message per wrong knob."""

import pytest

from qat.model.ptq_spec import recipe_from
from qat.spec import PRESETS, QuantSpec, recipe
from qat.utils.validate import FLOAT_BITS
from tests.errors import usage_error

WRONG_KNOBS = [
    ({"act_bits": 32, "weight_quantizer": "float"}, "quant.act_bits=32: must be"),
    (
        {"weight_quantizer": "lsqq"},
        "quant.weight_quantizer='lsqq': must be one of statsq, statsq_rms, lsq, seq, minmax, mxfp, "
        "nvfp4, fp8, float, dorefa or package.module:Class",
    ),
    ({"act_quantizer": "my module:Class"}, "quant.act_quantizer='my module:Class': must be"),
    (
        {"overrides": ["blocks.0"]},
        r"quant.overrides=\['blocks.0'\]: must be {module glob: {setting: value}}",
    ),
    (
        {"overrides": {3: {"bits": 8}}},
        r"quant.overrides={3: {'bits': 8}}: must be {module glob: {setting: value}}",
    ),
    (
        {"overrides": {"blocks.0.*": {"bit": 8}}},
        r"quant.overrides\['blocks.0.\*'\]={'bit': 8}: must be {setting: value} with settings among act_bits, .*, bits, ",
    ),
    ({"overrides": {"blocks.0.*": {"bits": 99}}}, "quant.bits=99: must be"),
]


@pytest.mark.parametrize(("knobs", "message"), WRONG_KNOBS, ids=[str(k) for k, _ in WRONG_KNOBS])
def test_wrong_knobs_are_named(knobs, message):
    with usage_error(message):
        recipe("ofq", **knobs)


@pytest.mark.parametrize(
    ("name", "knobs", "line"),
    [
        ("seq", {"wbits": 2}, "recipe: wbits=2: must be bits=2"),
        (None, {"wbits": 2}, "recipe: wbits=2: must be bits=2"),
        ("seq_2bit", {"abits": 8}, "recipe: abits=8: must be act_bits=8"),
        ("ofq", {"stembits": 8}, "recipe: stembits: unknown; closest: stem_bits, bits, act_bits"),
    ],
)
def test_knobs_that_there_are_not(name, knobs, line):
    with pytest.raises(TypeError, match=f"^{line}$"):
        recipe(name, **knobs)


@pytest.mark.parametrize("name", [None, "seq_5bit"])
def test_names_that_there_are_not(name):
    with usage_error(rf"^recipe={name!r}: must be one of .*seq, .*seq_2bit"):
        recipe(name)


def test_presets():
    chosen = {
        n: (r.attention, r.weight_quantizer, r.act_quantizer, r.offsets)
        for n, r in ((n, recipe(n)) for n in PRESETS)
    }
    assert chosen == {
        "fp": ("float", "float", "float", False),
        "ofq": ("qkr", "statsq", "lsq", True),
        "ofq_noqkr": ("standard", "statsq", "lsq", True),
        "statsq": ("standard", "statsq", "float", True),
        "lsq": ("standard", "lsq", "lsq", False),
        "seq": ("standard", "seq", "seq", True),
        "minmax": ("standard", "minmax", "minmax", False),
        "mxfp4": ("standard", "mxfp", "mxfp", False),
        "nvfp4": ("standard", "nvfp4", "nvfp4", False),
        "fp8": ("float", "fp8", "fp8", False),
        **dict.fromkeys(
            ("deploy_w8a8", "deploy_w4a8", "deploy_w4a4"), ("standard", "lsq", "lsq", False)
        ),
    }
    assert recipe("ofq").qk_bias == "drop"


def test_rules_of_a_preset_stay_beside_others_and_can_be_replaced():
    own = {"*.attn.proj": {"act_quantizer": "lsq"}}
    assert recipe("seq", overrides={"blocks.0.*": {"bits": 8}}).overrides == {
        **own,
        "blocks.0.*": {"bits": 8},
    }
    assert recipe("seq", overrides={"*.attn.proj": {"act_quantizer": "seq"}}).overrides == {
        "*.attn.proj": {"act_quantizer": "seq"}
    }
    assert recipe("seq", overrides=None).overrides == own
    rules = {"blocks.*": {"bits": 8}, "*.attn.proj": {"bits": 4}}
    layer = recipe("seq", bits=2, overrides=rules).at("blocks.0.attn.proj")
    assert (layer.bits, layer.act_quantizer) == (4, "lsq"), "the last rule wins and keeps the rest"


def test_recipes_to_deploy_have_one_step_a_tensor_and_codes_of_int8():
    made = recipe("deploy_w4a8")
    specs = {role: made.act_spec(role, "block") for role in ("input", "q", "k", "v", "probs")} | {
        "image": made.act_spec("image", "stem")
    }
    assert {(spec.axis, spec.offsets) for spec in specs.values()} == {(None, "none")}
    assert {spec.qmax for spec in specs.values()} == {127}
    assert made.weight_spec("block").qmin == -8


def test_rules_that_do_not_go_together_are_named_where_they_meet():
    blocks = {"weight_quantizer": "nvfp4", "act_quantizer": "nvfp4"}
    made = recipe("lsq", overrides={"blocks.*": blocks, "blocks.0.*": {"bits": 8}})
    assert made.at("blocks.1.attn").weight_quantizer == "nvfp4"
    with usage_error(r"^quant.overrides\['blocks.0.attn'\]: quant.bits=8: must be"):
        made.at("blocks.0.attn")


def test_rules_of_a_stored_recipe_keep_their_meaning():
    stored = recipe("ofq", bits=2, overrides={"blocks.0.*": {"bits": 4}}).to_dict()
    del stored["rule_bits"]
    older = recipe_from(stored).at("blocks.0.attn")
    assert (older.bits, older.act_bits) == (4, 2)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("block", QuantSpec("weight", "statsq", 2, axis=0)),
        ("block", QuantSpec("qk", "statsq", 2, axis=0)),
        ("stem", QuantSpec("weight", "lsq", 8, axis=0)),
        ("head", QuantSpec("weight", "lsq", 8, axis=0)),
    ],
)
def test_weights_of_ofq(place, expected):
    assert recipe("ofq", bits=2).weight_spec(place, expected.role) == expected


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("block", QuantSpec("input", "lsq", 3, axis=-2, offsets="both")),
        ("block", QuantSpec("q", "lsq", 3, axis=-2, offsets="both")),
        ("block", QuantSpec("k", "lsq", 3, axis=-2, offsets="before")),
        ("block", QuantSpec("v", "lsq", 3, axis=-1, offsets="both")),
        ("block", QuantSpec("probs", "lsq", 3, signed=False, axis=-2)),
        (
            "stem",
            QuantSpec("image", "lsq", 8, signed=None, axis=1, offsets="both", offset_ndim=2),
        ),
        ("head", QuantSpec("input", "lsq", 8, axis=None, offsets="both")),
    ],
)
def test_activations_of_ofq(place, expected):
    assert recipe("ofq", bits=2, act_bits=3).act_spec(expected.role, place) == expected


def test_float_quantizers_are_everywhere_or_nowhere():
    made = recipe("ofq", weight_quantizer="float", act_quantizer="float")
    specs = [made.weight_spec(p) for p in ("stem", "block", "head")] + [
        made.act_spec("input", p) for p in ("block", "head")
    ]
    assert {(s.quantizer, s.bits, s.offsets) for s in specs} == {("float", FLOAT_BITS, "none")}


@pytest.mark.parametrize("name", ["ofq", "ofq_noqkr", "lsq", "statsq", "seq"])
def test_steps_are_relative_unless_they_come_from_an_older_file(name):
    made = recipe(name)
    assert {made.weight_spec("head").steps, made.act_spec("input", "block").steps} <= {"relative"}
    older = {key: value for key, value in made.to_dict().items() if key != "steps"}
    assert recipe_from(older).steps == "absolute"
