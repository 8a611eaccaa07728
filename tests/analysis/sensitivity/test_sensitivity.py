"""Sensitivity of parts, and bits under a size. Oracle: evaluations made here, nets that were converted anew, all combinations."""

import itertools
import re

import pytest
from omegaconf import OmegaConf

import qat
from qat.analysis.runner import measure
from qat.analysis.sensitivity import Sensitivity
from qat.analysis.sensitivity.findings import SensitivityResults
from qat.analysis.sensitivity.mix import NetSizes, as_setting
from qat.analysis.sensitivity.parts import take_apart
from qat.errors import UsageError
from qat.model.cost import size_bytes
from qat.quantizers import Quantizer
from tests import tiny
from tests.analysis.common import image_set, is_as_before, net_of, state, studied
from tests.analysis.sensitivity.test_parts import converted_anew


class Doubling(Quantizer):
    """Of a weight; nobody knows its grid."""

    def forward(self, x):
        return (2 * x).round() / 2

    def codes(self, x):
        return (2 * x).round().char()


def rows_of(analysis, nets, folder, images=None):
    """All evaluations, follow-ups too."""
    images = images or image_set()
    rows = measure(analysis.points(nets, images), images)
    return rows + measure(analysis.follow_up(nets, images, rows), images)


def overrides(setting):
    """What Hydra makes of a setting: the group and its rules."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(setting)
    group, _, key = parsed.key_or_group.rpartition(".")
    assert key == "overrides"
    return group, OmegaConf.to_container(OmegaConf.create(parsed.value()))


@pytest.mark.parametrize(("kind", "by"), [("ofq2", "module"), ("ptq4", "block")])
def test_every_row_is_what_an_evaluation_gives(tmp_path, kind, by):
    net, images = net_of(kind), image_set()
    before = state(net)
    rows = rows_of(Sensitivity(by=by, bits=(2, 8)), [studied(net)], tmp_path)
    apart = take_apart(net, tiny.SIZE, by)
    parts = {part.name: part for part in apart.parts}
    score = lambda: images.score(tiny.logits.__get__(net))  # noqa: E731
    measures = [row["measure"] for row in rows]
    assert measures[:2] == ["as it is", "float"]
    assert measures.count("only") == measures.count("without") == len(parts)
    # StatsQ has 2 bits already and the stem and the head have 8; the others get both widths.
    expected_bits = sum((bits != part.bits) for part in parts.values() if part.weights for bits in (2, 8))
    assert measures.count("bits") == expected_bits
    for row in [rows[0], *rows[2::5]]:
        changes = {"only": apart.only, "without": apart.without}
        if row["measure"] == "as it is":
            found = score()
        elif row["measure"] == "bits":
            with apart.with_bits({row["part"]: row["bits"]}, "own"):
                found = score()
        else:
            with changes[row["measure"]](parts[row["part"]]):
                found = score()
        assert (row["top1"], row["loss"]) == (found["top1"], found["loss"])
    assert is_as_before(net, before)


def test_the_table_holds_differences(tmp_path):
    analysis, net = Sensitivity(bits=(2, 3)), net_of("ptq4")
    rows = rows_of(analysis, [studied(net, "mine")], tmp_path)
    outcome = analysis.outcome([studied(net, "mine")], rows)
    (table,) = outcome.tables
    base = {row["measure"]: row for row in rows[:2]}
    found = next(row for row in table.rows if row["part"] == "blocks.1.mlp.fc2")
    own = {row["measure"] if row["measure"] != "bits" else row["bits"]: row for row in rows if row.get("part") == "blocks.1.mlp.fc2"}
    assert found["quantized alone: loss change"] == own["only"]["loss"] - base["float"]["loss"]
    assert found["left in float: loss change"] == own["without"]["loss"] - base["as it is"]["loss"]
    assert found["3 bits: loss change"] == own[3]["loss"] - base["as it is"]["loss"]
    assert found["2 bits: top-1 change (points)"] == own[2]["top1"] - base["as it is"]["top1"]
    assert (found["net"], found["bits"], found["weights"]) == ("mine", 4, 32 * 128)
    worst = max(table.rows, key=lambda row: row["quantized alone: loss change"])
    assert outcome.summary["mine"]["most_sensitive_only"]["part"] == worst["part"]
    assert outcome.summary["mine"]["float"]["loss"] == base["float"]["loss"]
    bars, heat = outcome.drawings
    assert worst["part"] in bars.alt
    assert "at 2 bits" in heat.alt


@pytest.mark.parametrize("kind", ["ofq2", "noqkr", "lsq4", "statsq", "ptq4", "inputs"])
def test_sizes_are_those_of_nets_converted_with_the_setting(kind):
    net = net_of(kind)
    apart = take_apart(net, tiny.SIZE, "module")
    sizes = NetSizes(apart, (2, 3, 8))
    bits = {part.name: width for part, width in zip(sizes.parts, itertools.cycle((2, 8, 3)))}
    group, rules = overrides(as_setting(apart, bits))
    assert group == ("ptq" if kind in {"ptq4", "inputs"} else "quant")
    anew = (
        converted_anew(kind, rules)
        if kind != "lsq4"
        else qat.convert(tiny.vit(), qat.recipe("lsq", bits=4, overrides=rules), input_size=tiny.SIZE)
    )
    found = {site.name.rpartition(".")[0]: site.quantizer.spec.bits for site in qat.iter_quantizers(anew) if site.is_weight}
    assert {name: found[name] for name in bits} == bits
    assert sizes.total(bits) == size_bytes(anew)
    acts = [{s.name: s.quantizer.spec for s in qat.iter_quantizers(n) if not s.is_weight} for n in (net, anew)]
    assert acts[0] == acts[1]


def test_a_setting_keeps_the_rules_of_the_recipe():
    rules = {"blocks.0.*": {"act_bits": 8, "bits": 3}, "head": {"weight_quantizer": "float", "head_bits": 32}}
    net = qat.convert(tiny.vit(), qat.recipe("statsq", bits=4, overrides=rules), input_size=tiny.SIZE)
    apart = take_apart(qat.initialize_scales(net, [tiny.images()]), tiny.SIZE, "block")
    assert [part.fixed for part in apart.parts if part.name == "head"] == ["its weights are float by the recipe"]
    group, written = overrides(as_setting(apart, {"blocks.0": 2, "blocks.1": 3}))
    assert (group, written["blocks.0.*"], written["head"]) == ("quant", rules["blocks.0.*"], rules["head"])
    recipe = qat.recipe("statsq", bits=4, overrides=written)
    assert [recipe.at(f"blocks.{b}.mlp.fc1").bits for b in (0, 1)] == [2, 3]
    assert recipe.at("blocks.0.mlp.fc1").act_bits == 8


def test_the_best_mix_is_that_of_all_combinations():
    apart = take_apart(net_of("ptq4"), tiny.SIZE, "block")
    sizes = NetSizes(apart, (2, 3, 8))
    rises = {(part.name, bits): 0.1 * (i + 1) / bits + 0.01 * i for i, part in enumerate(sizes.parts) for bits in (2, 3, 4, 8)}
    names = [part.name for part in sizes.parts]
    every = [dict(zip(names, bits, strict=True)) for bits in itertools.product((2, 3, 4, 8), repeat=len(names))]
    least, most = sizes.bounds()
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = least + share * (most - least)
        mix = sizes.best(budget / 1e6 + 1e-12, rises)
        fitting = [sum(rises[name, b] for name, b in bits.items()) for bits in every if sizes.total(bits) <= budget]
        assert mix.size_bytes <= budget + 1
        assert mix.rise == pytest.approx(min(fitting))
    assert mix.bits == dict.fromkeys(names, 8)


@pytest.mark.parametrize("kind", ["ofq2", "ptq4"])
def test_a_suggestion_is_evaluated_as_a_whole(tmp_path, kind):
    net = net_of(kind)
    sizes = NetSizes(take_apart(net, tiny.SIZE, "module"), (2, 4))
    budget = round(sum(sizes.bounds()) / 2e6, 5)
    analysis = Sensitivity(measures=["bits"], bits=[2, 4], budget_mb=budget)
    rows = rows_of(analysis, [studied(net)], tmp_path)
    assert [row["measure"] for row in rows[-3:]] == ["suggested", "uniform", "uniform"]
    outcome = analysis.outcome([studied(net)], rows)
    suggested, two, four = outcome.summary["net"]["suggestions"]
    assert suggested["size_bytes"] <= budget * 1e6
    base = rows[0]["loss"]
    changes = {(row["part"], row["bits"]): row["loss"] - base for row in rows if row["measure"] == "bits"}
    expected = base + sum(changes.get((name, bits), 0.0) for name, bits in suggested["bits_of_parts"].items())
    assert suggested["expected_loss"] == pytest.approx(expected, abs=1e-12)
    group, rules = overrides(suggested["setting"])
    assert group == ("ptq" if kind == "ptq4" else "quant")
    anew = converted_anew(kind, rules)
    assert image_set().score(tiny.logits.__get__(anew))["loss"] == suggested["loss"]
    assert size_bytes(anew) == suggested["size_bytes"]
    assert (two["bits"], four["bits"]) == (2, 4)
    assert two["size_bytes"] < suggested["size_bytes"] < four["size_bytes"]
    assert "Framed" in outcome.drawings[0].title
    assert f"{suggested['loss']:.4f}" in outcome.drawings[-1].alt


def test_a_float_net_gets_bits_for_ptq(tmp_path):
    net = tiny.vit()
    before = state(net)
    analysis = Sensitivity(bits=[2, 8], by="block", budget_mb=0.02)
    rows = rows_of(analysis, [studied(net)], tmp_path)
    assert {row["measure"] for row in rows} == {"as it is", "bits", "suggested", "uniform"}
    outcome = analysis.outcome([studied(net)], rows)
    suggested = outcome.summary["net"]["suggestions"][0]
    group, rules = overrides(suggested["setting"])
    assert group == "ptq"
    knobs = {"placement": "inputs", "act_quantizer": "float", "attention": "float"}
    anew = qat.convert(tiny.vit(), qat.PtqRecipe(bits=4, **knobs, overrides=rules), input_size=tiny.SIZE)
    assert size_bytes(anew) == suggested["size_bytes"]
    assert is_as_before(net, before)


def test_nothing_is_suggested_as_long_as_a_measurement_is_missing(tmp_path):
    net = net_of("ptq4")
    analysis = Sensitivity(bits=[2, 4], by="block", budget_mb=1.0)
    rows = rows_of(analysis, [studied(net)], tmp_path)
    for count in range(len(rows)):
        outcome = analysis.outcome([studied(net)], rows[:count])
        complete = sum(row["measure"] == "bits" for row in rows[:count]) == sum(row["measure"] == "bits" for row in rows)
        assert ("suggestions" in outcome.summary["net"]) == complete


def test_two_nets_have_pictures_of_their_own(tmp_path):
    nets = [studied(net_of("ofq2"), "two"), studied(net_of("ptq4"), "four")]
    analysis = Sensitivity(bits=[2, 3], by="block", measures=["without", "bits"])
    outcome = analysis.outcome(nets, rows_of(analysis, nets, tmp_path))
    assert [drawing.name for drawing in outcome.drawings] == ["sensitivity-1", "sensitivity_bits-1", "sensitivity-2", "sensitivity_bits-2"]
    assert set(outcome.summary) == {"two", "four"}


def test_what_is_left_alone_is_named(tmp_path):
    kind = "tests.analysis.sensitivity.test_sensitivity:Doubling"
    rules = {"blocks.0.mlp.fc1": {"weight_quantizer": kind}}
    net = qat.convert(tiny.vit(), qat.recipe("statsq", bits=4, overrides=rules), input_size=tiny.SIZE)
    qat.initialize_scales(net, [tiny.images()])
    analysis = Sensitivity(bits=[2, 3])
    rows = rows_of(analysis, [studied(net)], tmp_path)
    assert {row["measure"] for row in rows if row.get("part") == "blocks.0.mlp.fc1"} == {"only", "without"}
    where = [warning.where for warning in analysis.outcome([studied(net)], rows).warnings]
    assert where == ["net: blocks.0.mlp.fc1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "layer"}, "analysis.by='layer': must be one of site, module, block"),
        ({"bits": [1]}, "analysis.bits=1: must be an integer from 2 to 8"),
        ({"bits": 4}, "analysis.bits=4: must be a list"),
        ({"measures": ["alone"]}, "analysis.measures='alone': must be one of only, without, bits"),
        ({"budget_mb": 0}, "analysis.budget_mb=0: must be a number above 0"),
        ({"budget_mb": "small"}, "analysis.budget_mb='small': must be a number above 0"),
        ({"steps_from": "best"}, "analysis.steps_from='best': must be one of own, minmax, percentile, mse"),
        (
            {"budget_mb": 1.0, "measures": ["only"]},
            "analysis.measures=['only']: a suggestion for analysis.budget_mb is made of measure bits",
        ),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(UsageError) as error:
        Sensitivity(**settings)
    assert str(error.value) == message


def test_a_budget_below_the_smallest_size_names_both():
    net = net_of("ptq4")
    least, most = NetSizes(take_apart(net, tiny.SIZE, "module"), (2, 8)).bounds()
    with pytest.raises(UsageError) as error:
        Sensitivity(bits=[2, 8], budget_mb=0.001).points([studied(net)], image_set())
    assert str(error.value).startswith(f"analysis.budget_mb=0.001: below the smallest possible size of net: {least / 1e6:f} MB")
    assert f"{most / 1e6:f}" in str(error.value)


# Megabytes times 10^6 lie below the first two in floating point; the seventh figure of the third rounds down.
@pytest.mark.parametrize("least", [125_014, 1_048_574, 1_234_564])
def test_the_smallest_size_that_is_printed_can_be_typed(least):
    sizes = NetSizes(take_apart(net_of("ptq4"), tiny.SIZE, "block"), (2, 8))
    sizes.rest += least - sizes.bounds()[0]
    with pytest.raises(UsageError) as error:
        sizes.check("net", (least - 1) / 1e6)
    printed = float(re.search(r"size of net: ([\d.]+) MB", str(error.value))[1])
    sizes.check("net", printed)
    rises = {(part.name, bits): 1 / bits for part in sizes.parts for bits in sizes.widths[part.name]}
    assert sizes.best(printed, rises).size_bytes == least


def test_nets_that_have_nothing_to_measure():
    images = image_set()
    with pytest.raises(UsageError, match=r"analysis.measures=\['only'\]: net has nothing of the kind; a float net has bits"):
        Sensitivity(measures=["only"]).points([studied(tiny.vit())], images)
    acts = qat.convert(tiny.vit(), qat.recipe("lsq", weight_quantizer="float", bits=4), input_size=tiny.SIZE)
    with pytest.raises(UsageError, match=r"analysis.budget_mb=1.0: net has no weights whose bits can be chosen; must be null"):
        Sensitivity(budget_mb=1.0).points([studied(acts)], images)


def test_choosing_on_test_images_is_warned_of(caplog):
    Sensitivity(budget_mb=1.0).points([studied(net_of("ptq4"))], image_set())
    assert "make a test accuracy no estimate" in caplog.text
    assert Sensitivity.split == "val"


def test_findings_of_missing_rows():
    findings = SensitivityResults([{"net": "a", "measure": "as it is", "loss": 1.0, "top1": 50.0}])
    part = next(part for part in take_apart(net_of("ptq4"), tiny.SIZE, "module").parts if part.weights)
    assert findings.change("a", "as it is", "only", "loss", part="x") is None
    assert findings.rise("a", part, 4) == 0.0
    assert findings.rise("a", part, 2) is None
    assert findings.rise("b", part, 4) is None
