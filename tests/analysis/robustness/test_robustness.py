"""What is evaluated, and what becomes of it. Oracle: curves worked out by hand, and the nets' own accuracy under each change."""

import dataclasses
import json

import pytest
import torch

import qat
from qat.analysis import measure, write_outcome
from qat.analysis.requantize import WeightChange, weight_sites
from qat.analysis.robustness.findings import curve_numbers
from qat.analysis.robustness.robustness import PARTS, Robustness
from qat.errors import UsageError
from qat.utils.files import csv_text
from tests import tiny
from tests.analysis.common import image_set, is_as_before, net_of, state, studied
from tests.conftest import ROOT

OF_WEIGHTS = ("steps", "bits", "power_of_two", "quantizers")
SMALL = {"ratios": 3, "bits": (2, 4, 32), "severities": (5,), "corruptions": ("contrast", "shot_noise"), "draws": 2}


def run(analysis, nets, folder, images=None):
    """All rows, and the outcome."""
    images = images or image_set()
    rows = measure(analysis.points(nets, images), images)
    return rows, analysis.outcome(nets, rows)


def keys(analysis, *nets):
    return [dict(point.key) for point in analysis.points(nets, image_set())]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A quantized net and a float one: the nets, all rows, the outcome."""
    nets = [studied(net_of("ofq2"), "ours"), studied(tiny.vit(), "float")]
    return nets, *run(Robustness(**SMALL), nets, tmp_path_factory.mktemp("compared"))


def test_numbers_of_a_curve_by_hand():
    curve = [(0.8, 40.0), (0.9, 60.0), (1.0, 80.0), (1.2, 76.0)]
    found = curve_numbers(curve, 80.0)
    assert (found["lowest"], found["lowest_at"], found["mean"]) == (40.0, 0.8, 64.0)
    # Trapezoids of 5, 7 and 15.6 on a length of 0.4, over 80.
    assert found["area"] == pytest.approx(27.6 / 32)
    # At least 78: a tenth of [0.9, 1], half of [1, 1.2].
    assert found["width"] == pytest.approx(0.01 + 0.1)


@pytest.mark.parametrize(
    ("values", "area", "width"),
    [
        ([50.0, 50.0, 50.0], 1.0, 0.6),
        ([10.0, 50.0, 10.0], 0.6, 0.6 * 2 / 40),
        ([60.0, 50.0, 60.0], 1.1, 0.6),
        ([48.0, 50.0, 47.0], 0.975, 0.5),
    ],
)
def test_width_and_area_of_simple_curves(values, area, width):
    found = curve_numbers(list(zip([0.7, 1.0, 1.3], values, strict=True)), 50.0)
    assert found["area"] == pytest.approx(area)
    assert found["width"] == pytest.approx(width)


def test_a_net_that_is_never_right_has_no_area():
    assert curve_numbers([(0.7, 0.0), (1.3, 0.0)], 0.0)["area"] is None


def test_every_part_of_a_quantized_net():
    found = keys(Robustness(), studied(net_of("ofq2")))
    assert found[0] == {"net": "net", "part": "clean"}
    counts = {part: sum(key["part"] == part for key in found) for part in PARTS}
    # Ratio 1 and the trained width are the net as it is; three draws of stochastic rounding.
    assert counts == {"steps": 20, "bits": 6, "power_of_two": 1, "corruptions": 24, "quantizers": 8}
    assert len({json.dumps(key) for key in found}) == len(found)
    ratios = [key["ratio"] for key in found if key["part"] == "steps"]
    assert ratios == [round(0.7 + 0.03 * i, 2) for i in range(21) if i != 10]
    assert [key["bits"] for key in found if key["part"] == "bits"] == [3, 4, 5, 6, 8, 32]


@pytest.mark.parametrize("parts", [["bits"], ["steps", "power_of_two"], ["corruptions"], ["quantizers"]])
def test_parts_can_be_chosen(parts, tmp_path):
    rows, outcome = run(Robustness(**SMALL, parts=parts), [studied(net_of("lsq2"))], tmp_path)
    assert {row["part"] for row in rows} == {"clean", *parts}
    named = {
        "bits": "bit_widths",
        "steps": "step_sizes",
        "power_of_two": "policies",
        "corruptions": "corruptions",
        "quantizers": "policies",
    }
    assert {table.name for table in outcome.tables} == {named[part] for part in parts}
    assert outcome.warnings == [] or parts == ["steps", "power_of_two"]


@pytest.mark.parametrize("kind", ["ofq2", "lsq2", "minmax", "ptq3"])
@torch.no_grad()
def test_accuracies_are_those_of_the_changed_weights(kind, tmp_path):
    net, images = net_of(kind), image_set(24)
    before = state(net)
    rows, _ = run(Robustness(low=0.5, high=2.0, ratios=2, bits=[4, 32], parts=["steps", "bits"]), [studied(net)], tmp_path, images)
    assert is_as_before(net, before)
    weights = weight_sites(net, tiny.SIZE)
    blocks = [s for s in weights.sites if s.place == "block" or s.grid.bits == 3]
    changes = [(WeightChange(), ()), (WeightChange(ratio=0.5), weights.sites), (WeightChange(ratio=2.0), weights.sites)]
    changes += [(WeightChange(bits=bits), blocks) for bits in (4, 32)]
    for row, (change, sites) in zip(rows, changes, strict=True):
        with weights.changed(change, sites if kind != "minmax" or change.bits is None else _resized(weights)):
            expected = images.score(net)
        assert (row["top1"], row["loss"]) == (expected["top1"], expected["loss"]), row


def _resized(weights):
    return [site for site in weights.sites if site.place == "block"]


@pytest.mark.parametrize(("kind", "edges"), [("ofq2", False), ("ptq4", True), ("minmax", False)])
def test_stem_and_head_go_along_where_they_are_as_wide_as_the_blocks(kind, edges):
    for setting, expected in ((None, edges), ("keep", False), ("change", True)):
        subject = Robustness(stem_and_head=setting).subject(studied(net_of(kind)))
        assert ({site.place for site in subject.resized} == {"stem", "block", "head"}) == expected
        assert {"block"} <= {site.place for site in subject.resized}


def test_the_star_stands_at_the_mean_width():
    assert Robustness().subject(studied(net_of("ofq2"))).width == 2
    assert Robustness().subject(studied(tiny.vit())).width == 32
    mixed = tiny.quantized("statsq", bits=2, overrides={"*.mlp.*": {"bits": 4}}).eval()
    subject = Robustness(stem_and_head="keep").subject(studied(mixed))
    # Of a block of width 32: qkv 3, proj 1, mlp 8 times 32 x 32.
    assert subject.width == pytest.approx((4 * 2 + 8 * 4) / 12)
    found = [key["bits"] for key in keys(Robustness(parts=["bits"]), studied(mixed)) if key["part"] == "bits"]
    assert found == [2, 3, 4, 5, 6, 8, 32]


def test_weights_that_have_the_width_keep_their_steps(tmp_path):
    # LSQ's first step of a width it has would be another than the learned one.
    net = tiny.quantized("lsq", bits=4, overrides={"*.mlp.*": {"bits": 2}}).eval()
    subject = Robustness().subject(studied(net))
    point = subject.resized_to(2, WeightChange())
    with point.change():
        patched = {name for name, module in net.named_modules() if "forward" in module.__dict__}
    assert patched == {f"{site.name}.weight_quantizer" for site in subject.resized if ".mlp." not in site.name}


def test_a_float_net_has_widths_and_corruptions(tmp_path):
    net = tiny.vit()
    rows, outcome = run(Robustness(**SMALL), [studied(net)], tmp_path)
    assert {row["part"] for row in rows} == {"clean", "bits", "corruptions"}
    assert outcome.summary["net"].keys() == {"top1", "bits", "widths", "corruptions"}
    assert outcome.summary["net"]["widths"].keys() == {"2", "4", "float"}
    (advice,) = outcome.warnings
    assert advice.what == "net has no quantized weights for steps, power_of_two, quantizers"
    assert advice.advice == "analysis.float_bits=4 quantizes them first"


@pytest.mark.parametrize("scales", ["channel", "tensor"])
@torch.no_grad()
def test_a_float_net_is_quantized_where_that_is_wanted(tmp_path, scales):
    net, images = tiny.vit(), image_set(24)
    analysis = Robustness(**SMALL | {"parts": ["steps", "power_of_two"]}, float_bits=3, float_scales=scales, steps_from="mse")
    rows, outcome = run(analysis, [studied(net)], tmp_path, images)
    assert [row["part"] for row in rows] == ["clean", "quantized", "steps", "steps", "power_of_two"]
    recipe = qat.recipe("minmax", bits=3, attention="float", act_quantizer="float", act_bits=32, stem_bits=8, head_bits=8)
    twin = qat.convert(tiny.vit(), recipe, input_size=tiny.SIZE)
    with torch.no_grad():
        for site in qat.iter_quantizers(twin):
            if site.is_weight and site.name.startswith("blocks."):
                axis = 0 if scales == "channel" else None
                scale, zero = qat.functional.affine_scale(site.latent(), 3, signed=True, axis=axis, method="mse")
                site.quantizer.forward = lambda x, s=scale, z=zero, a=axis: qat.functional.fake_quantize_affine(x, s, z, -4, 3, a)
            elif site.is_weight:
                site.quantizer.forward = lambda x: x
    assert rows[1]["loss"] == images.score(twin)["loss"]
    assert rows[1]["loss"] != rows[0]["loss"]
    assert outcome.summary["net"]["top1_quantized"] == outcome.summary["net"]["steps"]["at_1"] == rows[1]["top1"]


def test_two_nets_are_compared(compared, tmp_path):
    _, _, outcome = compared
    assert list(outcome.summary) == ["ours", "float"]
    tables = {table.name: table.rows for table in outcome.tables}
    assert {row["net"] for row in tables["bit_widths"]} == {"ours", "float"}
    assert {row["net"] for row in tables["step_sizes"]} == {"ours"}
    assert [(row["bits"], row["as trained"]) for row in tables["bit_widths"]] == [(2, 1), (4, 0), (32, 0), (2, 0), (4, 0), (32, 1)]
    assert [drawing.name for drawing in outcome.drawings] == ["step_sizes", "bit_widths", "policies", "corruptions"]
    for drawing in outcome.drawings:
        named = {"step_sizes": ["ours"], "policies": ["ours"]}.get(drawing.name, ["ours", "float"])
        assert all(f"{label}: " in drawing.alt for label in named)
        assert "%" in drawing.alt
    write_outcome(tmp_path, "robustness", {}, outcome)
    assert {path.suffix for path in tmp_path.glob("step_sizes.*")} == {".csv", ".svg", ".png"}


def test_tables_hold_what_was_measured(compared):
    _, rows, outcome = compared
    rows = [row for row in rows if row["net"] == "ours"]
    by_key = {(row["part"], row.get("ratio"), row.get("policy"), row.get("kind"), row.get("draw")): row for row in rows}
    tables, clean = {table.name: table.rows for table in outcome.tables}, rows[0]["top1"]
    steps = tables["step_sizes"]
    assert [row["ratio"] for row in steps] == [0.7, 1.0, 1.3]
    assert steps[0]["top-1 (%)"] == by_key["steps", 0.7, None, None, None]["top1"]
    assert (steps[1]["top-1 (%)"], steps[1]["loss"]) == (clean, rows[0]["loss"])
    policies = {row["change"]: row for row in tables["policies"]}
    assert list(policies) == [
        *("none", "steps to powers of two", "half-up rounding", "floor rounding", "stochastic rounding"),
        *("minmax clipping", "percentile clipping", "mse clipping"),
    ]
    draws = [by_key["quantizers", None, "stochastic rounding", None, draw]["top1"] for draw in (0, 1)]
    assert policies["stochastic rounding"]["top-1 (%)"] == pytest.approx(sum(draws) / 2)
    assert policies["stochastic rounding"]["standard deviation"] == pytest.approx(abs(draws[0] - draws[1]) / 2**0.5)
    assert policies["none"]["difference (points)"] == 0
    contrast = tables["corruptions"][0]
    assert (contrast["corruption"], contrast["level 5"]) == ("contrast", 0.05)
    assert contrast["severity 5 (%)"] == contrast["mean (%)"] == by_key["corruptions", None, None, "contrast", None]["top1"]
    found = outcome.summary["ours"]["corruptions"]
    assert found["mean"] == pytest.approx(sum(found["kinds"].values()) / 2)
    assert found["relative"] == pytest.approx(found["mean"] / clean)


def test_an_interrupted_run_goes_on_and_says_the_same(tmp_path, monkeypatch):
    nets, images, analysis = [studied(net_of("ofq2"))], image_set(), Robustness(**SMALL)
    before, whole = state(nets[0].net), run(analysis, nets, tmp_path / "whole")[0]
    (tmp_path / "cut").mkdir()
    left, score = [], type(images).score

    def interrupting(self, predict, change=None):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return score(self, predict, change)

    monkeypatch.setattr(type(images), "score", interrupting)
    for count in (0, 1, 3, 4):
        left[:] = [True] * count
        with pytest.raises(KeyboardInterrupt):
            run(analysis, nets, tmp_path / "cut")
        assert is_as_before(nets[0].net, before)
    # What is left is just enough for what is missing.
    left[:] = [True] * (len(whole) - 8)
    rows, outcome = run(analysis, nets, tmp_path / "cut")
    assert left == []
    timeless = [[{key: value for key, value in row.items() if key != "seconds"} for row in some] for some in (rows, whole)]
    assert timeless[0] == timeless[1]
    assert [csv_text(table.rows) for table in outcome.tables] == [csv_text(table.rows) for table in analysis.outcome(nets, whole).tables]


@pytest.mark.parametrize("first", range(0, 20, 4))
def test_any_rows_make_an_outcome(compared, first):
    nets, rows, whole = compared
    for some in (rows[first : first + 4], rows[:first]):
        outcome = Robustness(**SMALL).outcome(nets, some)
        assert list(outcome.summary) == ["ours", "float"]
        known = {json.dumps(row, sort_keys=True) for table in whole.tables for row in table.rows}
        # Where nothing is averaged, what is there says the same as in the end.
        for table in outcome.tables:
            found = [json.dumps(row, sort_keys=True) for row in table.rows]
            assert table.name not in {"bit_widths"} or set(found) <= known


def test_a_fragile_net_gets_advice(tmp_path):
    nets = [studied(net_of("ofq2"))]
    base = [{"net": "net", "part": "clean", "top1": 70.0, "loss": 1.0, "seconds": 0.1}]
    steps = [{"net": "net", "part": "steps", "ratio": ratio, "top1": 20.0, "loss": 3.0, "seconds": 0.1} for ratio in (0.7, 1.3)]
    outcome = Robustness(**SMALL).outcome(nets, base + steps)
    (advice,) = outcome.warnings
    # 2 of 50 points on either side of 1, 0.3 long each.
    assert advice.what == "keeps its accuracy within 2 points only for steps of a range of 2.4 %"
    assert "loss.kure" in advice.advice
    assert Robustness(**SMALL).outcome(nets, base + steps[:1]).warnings == []


@pytest.mark.parametrize(("low", "high"), [(0.99, 1.01), (0.96, 1.04), (0.951, 1.052)])
def test_a_net_that_loses_nothing_in_a_narrow_range_is_not_fragile(low, high):
    analysis, net = Robustness(parts=["steps"], low=low, high=high, ratios=3), studied(net_of("ofq2"))
    rows = [{**point.key, "top1": 70.0, "loss": 1.0, "seconds": 0.1} for point in analysis.points([net], image_set())]
    outcome = analysis.outcome([net], rows)
    assert outcome.summary["net"]["steps"]["width"] == pytest.approx(high - low)
    assert outcome.warnings == []
    lost = [{**row, "top1": 20.0} if row.get("ratio") == low else row for row in rows]
    assert len(analysis.outcome([net], lost).warnings) == 1


def test_weights_of_an_unknown_quantizer_are_named(tmp_path):
    name = "tests.analysis.test_requantize:Doubled"
    net = tiny.quantized("ofq_noqkr", bits=2, overrides={"blocks.0.mlp.fc1": {"weight_quantizer": name}}).eval()
    _, outcome = run(Robustness(**SMALL), [studied(net)], tmp_path)
    assert "stayed as they are in every change: blocks.0.mlp.fc1" in [advice.what for advice in outcome.warnings]
    alone = tiny.quantized("statsq", weight_quantizer=name).eval()
    with pytest.raises(UsageError, match="net has no weights on a grid that is known for steps; must be one of statsq, lsq, minmax"):
        Robustness(parts=["steps"]).points([studied(alone)], image_set())
    assert {key["part"] for key in keys(Robustness(), studied(alone))} == {"clean", "corruptions"}


def test_jpeg_is_for_one_and_three_channels():
    four = dataclasses.replace(studied(tiny.vit(in_chans=4)), input_size=(4, 8, 8))
    assert {key.get("kind") for key in keys(Robustness(), four)} >= {"contrast"}
    assert "jpeg" not in {key.get("kind") for key in keys(Robustness(), four)}
    with pytest.raises(UsageError, match=r"analysis\.corruptions=\['jpeg'\]: images have 4 channels; for jpeg it must be one of 1, 3"):
        Robustness(corruptions=["jpeg"]).points([four], image_set())


def test_the_yaml_has_every_setting_at_its_default():
    from omegaconf import OmegaConf

    content = OmegaConf.load(ROOT / "conf" / "analysis" / "robustness.yaml")
    content.seed = 0
    found = OmegaConf.to_container(content)
    assert found.pop("_target_") == "qat.analysis.robustness.Robustness"
    assert Robustness(**found) == Robustness(bits=[2, 3, 4, 5, 6, 8, 32], severities=[1, 3, 5])
    assert list(found) == [field.name for field in dataclasses.fields(Robustness)]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"parts": ["step"]}, "analysis.parts='step': must be one of steps, bits, power_of_two, corruptions, quantizers"),
        ({"parts": []}, "analysis.parts=[]: must be a list of steps, bits, power_of_two, corruptions, quantizers"),
        ({"parts": "steps"}, "analysis.parts='steps': must be a list of steps, bits, power_of_two, corruptions, quantizers"),
        ({"low": 0}, "analysis.low=0: must be a number above 0"),
        ({"low": -0.5}, "analysis.low=-0.5: must be a number above 0"),
        ({"low": 1.3}, "analysis.high=1.3: must be a number above 1.3"),
        ({"ratios": 1}, "analysis.ratios=1: must be an integer of at least 2"),
        ({"bits": [1]}, "analysis.bits=1: must be an integer from 2 to 8"),
        ({"bits": [2, 16]}, "analysis.bits=16: must be an integer from 2 to 8"),
        ({"bits": 4}, "analysis.bits=4: must be a list of whole numbers from 2 to 8, and 32"),
        ({"steps_from": "max"}, "analysis.steps_from='max': must be one of own, minmax, percentile, mse"),
        ({"stem_and_head": True}, "analysis.stem_and_head=True: must be one of keep, change"),
        ({"float_bits": 32}, "analysis.float_bits=32: must be an integer from 2 to 8"),
        ({"float_scales": "row"}, "analysis.float_scales='row': must be one of channel, tensor"),
        ({"corruptions": ["fog"]}, "analysis.corruptions='fog': must be one of gaussian_noise, shot_noise, impulse_noise, gaussian_blur, "),
        ({"severities": [6]}, "analysis.severities=6: must be an integer from 1 to 5"),
        ({"draws": 0}, "analysis.draws=0: must be an integer of at least 1"),
        ({"percentile": 0.5}, "analysis.percentile=0.5: must be a number above 0.5 to 1"),
        ({"seed": -1}, "analysis.seed=-1: must be an integer of at least 0"),
    ],
)
def test_mistakes(settings, line):
    with pytest.raises(UsageError) as error:
        Robustness(**settings)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize("parts", [["steps"], ["bits", "quantizers"], ["power_of_two"]])
def test_a_part_that_needs_quantized_weights_says_so(parts):
    wanted = parts[-1]
    line = f"analysis.parts={parts}: net has no quantized weights for {wanted}; analysis.float_bits=4 quantizes them first"
    with pytest.raises(UsageError) as error:
        Robustness(parts=parts).points([studied(tiny.vit())], image_set())
    assert str(error.value) == line
