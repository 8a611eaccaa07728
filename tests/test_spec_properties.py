"""Which values specs and settings take, and that they come back from plain data as they were.

Oracle: the documented ranges, spelled out here.
"""

import dataclasses
import fnmatch
import json

from hypothesis import given, settings
from hypothesis import strategies as st

import qat
from qat.model.ptq_spec import PtqRecipe, recipe_from
from qat.spec import OUTPUT_ROLES, ROLES, QuantRecipe, QuantSpec

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(2, 4), max_size=2),
)
WIDTHS = st.integers(2, 8)
MODULES = (
    "blocks.0.attn",
    "blocks.0.attn.qkv",
    "blocks.0.mlp.fc1",
    "blocks.1.mlp.fc2",
    "blocks.10.mlp.fc1",
    "patch_embed.proj",
    "head",
)
GLOBS = st.sampled_from([
    "*",
    "blocks.*",
    "blocks.0.*",
    "blocks.1.*",
    "*.mlp.*",
    "*.fc[12]",
    "head",
    "blocks.?.attn",
    "nothing",
])


def is_width(value):
    return isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 8


def taken(make, message):
    """True if a value is taken; one that is not is answered with a line that has `message` in it."""
    try:
        make()
    except qat.UsageError as error:
        line = str(error)
    else:
        return True
    assert message in line
    assert "\n" not in line
    return False


@given(st.sampled_from(["bits", "act_bits", "stem_bits", "head_bits"]), ANYTHING)
@EXAMPLES
def test_a_recipe_takes_widths_of_2_to_8(knob, value):
    is_left_open = value is None and knob == "act_bits"
    assert taken(
        lambda: QuantRecipe(**{knob: value}), f"quant.{knob}={value!r}: must be an integer"
    ) is (is_width(value) or is_left_open)


@given(st.sampled_from(["offsets", "weight_signed", "act_signed", "bias_correction"]), ANYTHING)
@EXAMPLES
def test_a_flag_is_true_or_false(knob, value):
    kind = QuantRecipe if knob == "offsets" else PtqRecipe
    assert taken(
        lambda: kind(**{knob: value}), f"{knob}={value!r}: must be true or false"
    ) is isinstance(value, bool)


@given(
    st.sampled_from([
        "attention",
        "qk_bias",
        "map_scales",
        "offset_init",
        "step_init",
        "weight_quantizer",
        "act_quantizer",
    ]),
    ANYTHING,
)
@EXAMPLES
def test_a_choice_is_none_of_anything(knob, value):
    assert not taken(
        lambda: QuantRecipe(**{knob: value}), f"quant.{knob}={value!r}: must be one of "
    )


@given(st.sampled_from(ROLES + OUTPUT_ROLES), ANYTHING, st.sampled_from([True, False, None]))
@EXAMPLES
def test_the_range_of_codes_follows_from_width_and_sign(role, bits, signed):
    if not taken(lambda: QuantSpec(role, "lsq", bits, signed=signed), "bits="):
        assert not is_width(bits)
        return
    spec = QuantSpec(role, "lsq", bits, signed=signed)
    assert is_width(bits)
    assert spec.qmax - spec.qmin + 1 == 2**bits
    assert (spec.qmin < 0) is bool(signed)
    assert dataclasses.replace(spec) == spec


recipes = st.builds(
    QuantRecipe,
    name=st.text(min_size=1, max_size=5),
    bits=WIDTHS,
    act_bits=st.one_of(st.none(), WIDTHS),
    attention=st.sampled_from(["qkr", "standard", "float"]),
    qk_bias=st.sampled_from(["drop", "fold"]),
    stem_bits=WIDTHS,
    head_bits=WIDTHS,
    offsets=st.booleans(),
    overrides=st.dictionaries(
        GLOBS, st.fixed_dictionaries({}, optional={"bits": WIDTHS, "act_bits": WIDTHS}), max_size=3
    ),
).filter(lambda recipe: recipe.name != "fp")
ptq_recipes = st.builds(
    PtqRecipe,
    bits=WIDTHS,
    act_bits=st.one_of(st.none(), WIDTHS),
    softmax_quantizer=st.sampled_from([None, "affine", "log2", "float"]),
    weight_observer=st.sampled_from(["minmax", "ema", "percentile", "omse", "mse", "mse_ends"]),
    act_scales=st.sampled_from(["tensor", "token", "channel"]),
    weight_signed=st.booleans(),
    placement=st.sampled_from(["inputs", "fqvit"]),
    overrides=st.dictionaries(
        GLOBS, st.fixed_dictionaries({}, optional={"bits": WIDTHS}), max_size=2
    ),
)


@given(st.one_of(recipes, ptq_recipes))
@EXAMPLES
def test_recipes_come_back_from_plain_data(recipe):
    stored = json.loads(json.dumps(recipe.to_dict()))
    found = recipe_from(stored)
    assert type(found) is type(recipe)
    assert found == recipe


@given(recipes, st.sampled_from(MODULES))
@EXAMPLES
def test_later_rules_win_where_their_globs_match(recipe, module):
    expected = {
        "bits": recipe.bits,
        "act_bits": recipe.act_bits,
        "stem_bits": recipe.stem_bits,
        "head_bits": recipe.head_bits,
    }
    for pattern, rule in recipe.overrides.items():
        if fnmatch.fnmatchcase(module, pattern):
            following = [
                "stem_bits",
                "head_bits",
                *(["act_bits"] if recipe.rule_bits == "both" else []),
            ]
            expected |= {knob: rule["bits"] for knob in following} if "bits" in rule else {}
            expected |= rule
    found = recipe.at(module)
    assert {knob: getattr(found, knob) for knob in expected} == expected
    assert found.overrides == {} or found is recipe
