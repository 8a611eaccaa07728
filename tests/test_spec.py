"""Specs and recipes. Oracle: the table of the paper's settings, and one message per wrong knob."""

import dataclasses

import pytest

import qat
from qat.model.ptq_spec import recipe_from
from qat.spec import PRESETS, ROLES, QuantRecipe, QuantSpec, recipe
from qat.utils.validate import FLOAT_BITS

KNOWN = "statsq, statsq_rms, lsq, seq, minmax, float"

WRONG_KNOBS = [
    ({"bits": 1}, "quant.bits=1: must be an integer from 2 to 8"),
    ({"bits": 9}, "quant.bits=9: must be an integer from 2 to 8"),
    ({"bits": 2.5}, "quant.bits=2.5: must be"),
    ({"bits": True}, "quant.bits=True: must be"),
    ({"bits": "2"}, "quant.bits='2': must be"),
    ({"bits": 32}, "quant.bits=32: must be"),
    ({"act_bits": 0}, "quant.act_bits=0: must be"),
    ({"act_bits": 32, "weight_quantizer": "float"}, "quant.act_bits=32: must be"),
    ({"stem_bits": 16}, "quant.stem_bits=16: must be"),
    ({"head_bits": -8}, "quant.head_bits=-8: must be"),
    ({"attention": "linear"}, "quant.attention='linear': must be one of qkr, standard, float"),
    ({"qk_bias": "keep"}, "quant.qk_bias='keep': must be one of drop, fold"),
    (
        {"weight_quantizer": "lsqq"},
        "quant.weight_quantizer='lsqq': must be one of statsq, statsq_rms, lsq, seq, minmax, float or package.module:Class",
    ),
    (
        {"act_quantizer": "a:b:c"},
        "quant.act_quantizer='a:b:c': must be one of statsq, statsq_rms, lsq, seq, minmax, float or package.module:Class",
    ),
    ({"act_quantizer": "my module:Class"}, "quant.act_quantizer='my module:Class': must be"),
    ({"act_quantizer": None}, "quant.act_quantizer=None: must be"),
    ({"offsets": "both"}, "quant.offsets='both': must be true or false"),
    ({"overrides": ["blocks.0"]}, r"quant.overrides=\['blocks.0'\]: must be a mapping of module globs to knobs"),
    ({"overrides": {"blocks.0.*": 8}}, r"quant.overrides\['blocks.0.\*'\]=8: its knobs must be among"),
    (
        {"overrides": {"blocks.0.*": {"bit": 8}}},
        r"quant.overrides\['blocks.0.\*'\]={'bit': 8}: its knobs must be among act_bits, .*, bits, ",
    ),
    ({"overrides": {"blocks.0.*": {"overrides": {}}}}, "its knobs must be among"),
    ({"overrides": {3: {"bits": 8}}}, "quant.overrides: 3: must be a glob of module names"),
    ({"overrides": {"blocks.0.*": {"bits": 99}}}, "quant.bits=99: must be"),
    ({"colour": "red"}, "recipe knob 'colour': must be one of name, bits, act_bits"),
]


@pytest.mark.parametrize(("knobs", "message"), WRONG_KNOBS, ids=[str(k) for k, _ in WRONG_KNOBS])
def test_wrong_knobs_are_named(knobs, message):
    with pytest.raises(qat.UsageError, match=message) as caught:
        recipe("ofq", **knobs)
    assert "\n" not in str(caught.value)


def test_unknown_recipe():
    with pytest.raises(qat.UsageError, match="recipe='oqf': must be one of fp, ofq, ofq_noqkr, statsq, lsq, seq, minmax"):
        recipe("oqf")


@pytest.mark.parametrize(
    ("knob", "value"),
    [("bits", 4), ("act_bits", 4), ("stem_bits", 8), ("head_bits", 8), ("weight_quantizer", "lsq"), ("act_quantizer", "lsq")],
)
def test_float_takes_no_quantization(knob, value):
    with pytest.raises(qat.UsageError, match=f"quant.{knob}={value!r}: quant=fp leaves the net in float"):
        recipe("fp", **({"bits": 4} if knob == "bits" else {knob: value}))


def test_a_usage_error_is_a_value_error():
    assert issubclass(qat.UsageError, ValueError)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_know_their_name_and_have_defaults(name):
    made = recipe(name)
    assert made.name == name.partition("_w")[0]
    widths = {"fp": (FLOAT_BITS, FLOAT_BITS), "deploy_w8a8": (8, 8), "deploy_w4a8": (4, 8)}
    assert (made.bits, made.act_bits) == widths.get(name, (4, 4))


def test_presets():
    chosen = {n: (r.attention, r.weight_quantizer, r.act_quantizer, r.offsets) for n, r in ((n, recipe(n)) for n in PRESETS)}
    assert chosen == {
        "fp": ("float", "float", "float", False),
        "ofq": ("qkr", "statsq", "lsq", True),
        "ofq_noqkr": ("standard", "statsq", "lsq", True),
        "statsq": ("standard", "statsq", "float", True),
        "lsq": ("standard", "lsq", "lsq", False),
        "seq": ("standard", "seq", "seq", True),
        "minmax": ("standard", "minmax", "minmax", False),
        **dict.fromkeys(("deploy_w8a8", "deploy_w4a8", "deploy_w4a4"), ("standard", "lsq", "lsq", False)),
    }
    assert recipe("ofq").qk_bias == "drop"


def test_rules_of_a_preset_stay_beside_others_and_can_be_replaced():
    own = {"*.attn.proj": {"act_quantizer": "lsq"}}
    assert recipe("seq", overrides={"blocks.0.*": {"bits": 8}}).overrides == {**own, "blocks.0.*": {"bits": 8}}
    assert recipe("seq", overrides={"*.attn.proj": {"act_quantizer": "seq"}}).overrides == {"*.attn.proj": {"act_quantizer": "seq"}}


def test_recipes_to_deploy_have_one_step_a_tensor_and_codes_of_int8():
    made = recipe("deploy_w4a8")
    specs = {role: made.act_spec(role, "block") for role in ("input", "q", "k", "v", "probs")} | {"image": made.act_spec("image", "stem")}
    assert {(spec.axis, spec.offsets) for spec in specs.values()} == {(None, "none")}
    assert {spec.qmax for spec in specs.values()} == {127}
    assert made.weight_spec("block").qmin == -8


def test_what_fits_int8():
    made, plain = recipe("lsq", bits=8, fits_int8=True), recipe("lsq", bits=8)
    assert [(r.act_spec("probs", "block").bits, r.act_spec("input", "block", signed=False).signed) for r in (made, plain)] == [
        (7, True),
        (8, False),
    ]
    few = dataclasses.replace(made, act_bits=4)
    assert (few.act_spec("probs", "block").bits, few.act_spec("input", "block", signed=False).signed) == (4, False)
    with pytest.raises(qat.UsageError, match="quant.fits_int8=1: must be true or false"):
        recipe("lsq", fits_int8=1)


def test_activation_bits_follow_the_weights_unless_given():
    assert recipe("ofq", bits=2).act_bits == 2
    assert recipe("ofq", bits=2, act_bits=4).act_bits == 4


@pytest.mark.parametrize("knobs", [{}, {"bits": 2, "act_bits": 3, "qk_bias": "fold"}, {"overrides": {"blocks.0.*": {"bits": 8}}}])
def test_round_trip_through_plain_data(knobs):
    made = recipe("ofq", **knobs)
    plain = made.to_dict()
    assert QuantRecipe(**plain) == made
    plain["overrides"]["x"] = {}
    assert "x" not in made.overrides


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("ofq").bits = 3


def test_overrides_are_copied():
    rules = {"blocks.0.*": {"bits": 8}}
    made = recipe("ofq", overrides=rules)
    rules["blocks.0.*"]["bits"] = 99
    assert made.at("blocks.0.mlp").bits == 8


def test_rules_apply_where_their_glob_matches():
    made = recipe("ofq", bits=2, overrides={"blocks.?.attn.*": {"bits": 8, "act_bits": 6}})
    assert (made.at("blocks.3.attn.proj").bits, made.at("blocks.3.attn.proj").act_bits) == (8, 6)
    assert made.at("blocks.3.mlp.fc1") == made
    assert made.at("blocks.11.attn.proj") == made
    assert made.at("Blocks.3.attn.proj") == made


@pytest.mark.parametrize(
    ("knobs", "rule", "bits"),
    [
        ({"bits": 2}, {"bits": 4}, (4, 4)),
        ({"bits": 2, "act_bits": 8}, {"bits": 4}, (4, 8)),
        ({"bits": 2, "act_bits": 2}, {"bits": 4}, (4, 2)),
        ({"bits": 2}, {"bits": 4, "act_bits": 3}, (4, 3)),
        ({"bits": 2}, {"act_bits": 8}, (2, 8)),
    ],
)
def test_bits_of_a_rule_mean_what_bits_of_the_recipe_mean(knobs, rule, bits):
    found = recipe("ofq", **knobs, overrides={"blocks.0.*": rule}).at("blocks.0.attn")
    assert (found.bits, found.act_bits) == bits
    everywhere = recipe("ofq", **{**knobs, **rule})
    assert (everywhere.bits, everywhere.act_bits) == bits


def test_rules_of_a_stored_recipe_keep_their_meaning():
    made = recipe("ofq", bits=2, overrides={"blocks.0.*": {"bits": 4}})
    assert recipe_from(made.to_dict()) == made
    older = {key: value for key, value in made.to_dict().items() if key != "rule_bits"}
    assert (recipe_from(older).at("blocks.0.attn").bits, recipe_from(older).at("blocks.0.attn").act_bits) == (4, 2)


def test_later_rules_win():
    rules = {"*": {"bits": 8, "qk_bias": "fold"}, "blocks.0.*": {"bits": 3}}
    first, later = recipe("ofq", overrides=rules), recipe("ofq", overrides=dict(reversed(rules.items())))
    assert (first.at("blocks.0.attn").bits, first.at("blocks.0.attn").qk_bias) == (3, "fold")
    assert later.at("blocks.0.attn").bits == 8


def test_bits_of_a_rule_hold_for_stem_and_head_too():
    made = recipe("ofq", overrides={"head": {"bits": 4}, "patch_embed.*": {"bits": 6, "stem_bits": 5}})
    assert made.at("head").weight_spec("head").bits == 4
    assert made.at("patch_embed.proj").weight_spec("stem").bits == 5
    assert made.weight_spec("head").bits == 8


@pytest.mark.parametrize(
    ("place", "role", "expected"),
    [
        ("block", "weight", QuantSpec("weight", "statsq", 2, axis=0)),
        ("block", "qk", QuantSpec("qk", "statsq", 2, axis=0)),
        ("stem", "weight", QuantSpec("weight", "lsq", 8, axis=0)),
        ("head", "weight", QuantSpec("weight", "lsq", 8, axis=0)),
    ],
)
def test_weights_of_ofq(place, role, expected):
    assert recipe("ofq", bits=2).weight_spec(place, role) == expected


@pytest.mark.parametrize(
    ("role", "place", "expected"),
    [
        ("input", "block", QuantSpec("input", "lsq", 3, axis=-2, offsets="both")),
        ("q", "block", QuantSpec("q", "lsq", 3, axis=-2, offsets="both")),
        ("k", "block", QuantSpec("k", "lsq", 3, axis=-2, offsets="before")),
        ("v", "block", QuantSpec("v", "lsq", 3, axis=-1, offsets="both")),
        ("probs", "block", QuantSpec("probs", "lsq", 3, signed=False, axis=-2)),
        ("image", "stem", QuantSpec("image", "lsq", 8, signed=None, axis=1, offsets="both", offset_ndim=2)),
        ("input", "head", QuantSpec("input", "lsq", 8, axis=None, offsets="both")),
    ],
)
def test_activations_of_ofq(role, place, expected):
    assert recipe("ofq", bits=2, act_bits=3).act_spec(role, place) == expected


def test_behind_a_gelu_the_input_is_unsigned():
    assert recipe("ofq").act_spec("input", "block", signed=False).signed is False


def test_offsets_can_be_left_out():
    made = recipe("ofq", offsets=False)
    assert {made.act_spec(r, "block").offsets for r in ROLES if r not in {"weight", "qk"}} == {"none"}


def test_float_quantizers_are_everywhere_or_nowhere():
    made = recipe("ofq", weight_quantizer="float", act_quantizer="float")
    specs = [made.weight_spec(p) for p in ("stem", "block", "head")] + [made.act_spec("input", p) for p in ("block", "head")]
    assert {(s.quantizer, s.bits, s.offsets) for s in specs} == {("float", FLOAT_BITS, "none")}


def test_minmax_weights_follow_the_present_range():
    assert recipe("minmax").weight_spec("block").quantizer == "minmax_dynamic"
    assert recipe("minmax").act_spec("input", "block").quantizer == "minmax"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"role": "colour"}, "role='colour': must be one of weight, input, q, k, v, qk, probs, image"),
        ({"bits": 1}, "bits=1: must be an integer from 2 to 8"),
        ({"bits": 32}, "bits=32: must be"),
        ({"offsets": "after"}, "offsets='after': must be one of none, before, both"),
    ],
)
def test_wrong_specs(arguments, message):
    with pytest.raises(qat.UsageError, match=message):
        QuantSpec(**{"role": "input", "quantizer": "lsq", "bits": 4, **arguments})


def test_unknown_place():
    with pytest.raises(qat.UsageError, match="place='tail': must be one of stem, block, head"):
        recipe("ofq").weight_spec("tail")


def test_float_weights_beside_activations_of_few_bits_name_their_setting():
    made = recipe("ofq", overrides={"head": {"weight_quantizer": "float", "bits": 32, "act_bits": 4}})
    with pytest.raises(qat.UsageError, match=r"^quant\.head_bits=32: activations are quantized too; must be with act_quantizer=float$"):
        made.at("head").act_spec("input", "head")


@pytest.mark.parametrize("name", ["ofq", "ofq_noqkr", "lsq", "statsq", "seq"])
def test_steps_are_relative_unless_they_come_from_an_older_file(name):
    made = recipe(name)
    assert {made.weight_spec("head").steps, made.act_spec("input", "block").steps} <= {"relative"}
    older = {key: value for key, value in made.to_dict().items() if key != "steps"}
    assert recipe_from(older).steps == "absolute"


def test_steps_of_a_tensor():
    made = recipe("seq", act_scales="tensor")
    assert {made.act_spec(role, "block").axis for role in ("input", "q", "k", "v", "probs", "image")} == {None}
    assert recipe("seq").act_spec("input", "block").axis == -2
