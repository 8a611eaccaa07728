"""Numbers, verdicts, pages. Oracles: worked out by hand, scipy's t-test; of the committed pages, what the records give."""

import base64
import re

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy import stats

from evidence.claims.arms import Arms
from evidence.claims.claim import Expectation
from evidence.claims.records import read_records
from evidence.pages import drawing, page
from evidence.pages.comparison import Comparison, compare
from evidence.pages.numbers import MIXED, spread
from qat.errors import UsageError
from tests.conftest import ROOT, compose
from tests.errors import usage_error
from tests.evidence import made

# What the headline's experiments are called, and the arms that they pin.
HEADLINE = {
    "cifar10_fp": "START/float",
    "cifar10_qat": "TUNE/seq_longest_shifts",
    "cifar10_qat quant=seq_3bit": "TUNE/seq_longest_w3_shifts_lr2e-3",
    "cifar10_qat quant=seq_4bit": "TUNE/seq_longest_w4_shifts_lr2e-3",
    "cifar10_qat quant=fp quant.steps=absolute": "AIM/control_longest_shifts_lr2e-3",
    "cifar10_qat quant=ofq_2bit quant.steps=absolute": "TUNE/longest_shifts_fast",
}
EXPECT = {"what": "it", "metric": "top1", "arm": "new", "than": "old", "direction": "higher"}


def test_pages_and_readme_are_what_the_records_give():
    assert page.check(ROOT) == []


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("ofq", ["quant.steps="]), ("seq", ["quant.offset_init=", "quant.offsets=false"])],
)
def test_recorded_commands_say_what_was_the_default_then(recipe, settings):
    commands = [
        record.command
        for record in read_records(ROOT / "evidence" / "records")
        if f" quant={recipe}" in record.command
    ]
    assert len(commands) > 200
    unclear = [one for one in commands if not any(setting in one for setting in settings)]
    assert unclear == []


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", HEADLINE)
def test_the_headline_has_a_name_that_trains_the_same(name):
    arms = Arms()
    asked = arms.settings(arms[HEADLINE[name]], 0)
    start = [one for one in asked if one.startswith("ckpt=")]
    # The float net that a run starts from is its teacher where none is named; loader processes change nothing.
    ours = compose(
        "train", *f"experiment={name}".split(), *start, "data.num_workers=0", "run_dir=a"
    )
    theirs = compose(
        "train", *(one for one in asked if not one.startswith("teacher.ckpt=")), "run_dir=a"
    )
    assert OmegaConf.to_container(ours, resolve=True) == OmegaConf.to_container(
        theirs, resolve=True
    )


@pytest.mark.parametrize(
    ("values", "spec", "text"),
    [
        ((), ".2f", "–"),
        ((61.2,), ".2f", "61.20"),
        ((60, 62), ".1f", "61.0 ± 1.4"),
        ((1.0, 2.0, 3.0), "+.2f", "+2.00 ± 1.00"),
    ],
)
def test_mean_and_sample_deviation(values, spec, text):
    assert spread(values, spec) == text


@pytest.mark.parametrize("shift", [-1.2, -0.5, 0.0, 0.3, 0.5, 1.2])
def test_verdicts_are_what_a_paired_t_test_at_five_per_cent_tells_apart(shift):
    found = [value + shift for value in (-0.7, 0.1, 0.4, -0.2, 0.4)]
    told_apart = stats.ttest_1samp(found, 0.0).pvalue < 0.05
    expectation = Expectation("it", "top1", "new", "old", "higher")
    answer = Comparison(expectation, tuple(found)).verdict
    assert answer == (
        "inconclusive" if not told_apart else "confirmed" if shift > 0 else "contradicted"
    )


@pytest.mark.parametrize(
    ("direction", "margin", "mean", "said"),
    [
        # All differences lie within 0.1 of their mean, their interval within 0.25.
        ("higher", 1.0, 1.3, "confirmed"),
        ("higher", 1.0, 0.7, "contradicted"),
        ("higher", 1.0, 1.0, "inconclusive"),
        ("lower", 0.5, -0.8, "confirmed"),
        ("within", 2.0, -1.7, "confirmed"),
        ("within", 2.0, -2.3, "contradicted"),
        ("near", 1.0, 0.7, "confirmed"),
        ("near", 1.0, 1.3, "contradicted"),
    ],
)
def test_answers(direction, margin, mean, said):
    expected = Expectation("it", "top1", "new", "old", direction, margin)
    assert Comparison(expected, (mean - 0.1, mean, mean + 0.1)).verdict == said
    assert Comparison(expected, (mean, mean)).verdict == "fewer than 3 seeds"


def test_seeds_are_paired_by_number_and_a_kept_start_stands_for_every_seed(tmp_path):
    made.claim(tmp_path, "START", arms={"float": {"label": "float", "seeds": [0], "keep": True}})
    made.claim(
        tmp_path,
        expect=[EXPECT, EXPECT | {"than": "START/float"}, EXPECT | {"than": 60, "metric": "other"}],
    )
    made.runs(tmp_path, "new", [61.0, None, 81.0, 91.0])
    made.runs(
        tmp_path, "old", [60.0, 70.0, 79.0]
    )  # seed 1 of the other measured nothing, seed 3 has no other
    made.runs(tmp_path, "float", [1.0], claim="START")
    found, claim = made.evidence(tmp_path)
    with usage_error(r"c1.yaml: new.other: must be one of top1"):
        compare(claim, found)
    assert found.differences(claim, ("new", "top1"), ("old", "top1")) == [1.0, 2.0]
    assert found.differences(claim, ("new", "top1"), ("START/float", "top1")) == [60.0, 80.0, 90.0]


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("New reaches {new.top1}.", "New reaches 63.00 ± 2.00."),
        ("{ old.top1 - new.top1:.1f}, `{{2,3}}`", "-2.0 ± 1.0, `{2,3}`"),
        ("{C1/new.top1:.0f}, {idle.top1}", "63 ± 2, (not run yet)"),
        ("{new.top1:interval}, {new.top1:n} {word}", "63.00 [58.03, 67.97], 3 seeds"),
        ("{new.top1 - old.top1:interval}", "+2.00 [-0.48, +4.48]"),
        ("{new.top1 - mean old.top1}", "+2.00 ± 2.00"),
        ("{new|old.top1}, {new|old.top1 - old|new.top1}", "62.00 ± 1.41, +0.00 ± 2.83"),
        ("{newer.top1}", UsageError("arm 'newer': must be")),
        ("{new.top1 - old.top5}", UsageError("old.top5: must be one of top1")),
    ],
)
def test_numbers_in_text(tmp_path, why, text):
    path = made.claim(tmp_path, why=why)
    made.runs(tmp_path, "new", [61.0, 63.0, 65.0])
    made.runs(tmp_path, "old", [60.0, 61.0, 62.0])
    found, claim = made.evidence(tmp_path)
    if isinstance(text, str):
        assert found.filled(claim, claim.why, {"word": "seeds"}) == text
        return
    with pytest.raises(UsageError) as error:
        found.filled(claim, claim.why)
    assert str(error.value).startswith(f"{path}: {text}")


def test_a_whole_page_and_its_pictures(tmp_path):
    lines = {
        "kind": "lines",
        "x": "bits",
        "y": "top-1, %",
        "series": {"New": {2: "new", 3: "idle"}, "Old": {2: "old"}},
    }
    curves = {
        "file": "b.svg",
        "kind": "curves",
        "curve": "val",
        "series": {"New": "new"},
        "reference": {"old": "old"},
    }
    table = {
        "rows": ["new", "old", "idle"],
        "columns": {"top1": "top-1"},
        "labels": {"old": "Older"},
    }
    made.claim(
        tmp_path,
        expect=[EXPECT],
        tables=[table],
        figures=[{"file": "a.svg", **lines}, curves],
        why="As in [ptq](ptq.md).",
    )
    made.runs(tmp_path, "new", [61.0, 62.0, 63.5], curves={"val": [[0, 1.0], [1, None], [2, 3.0]]})
    made.runs(tmp_path, "old", [60.0, 61.0, 62.0])
    found, claim = made.evidence(tmp_path)
    shown = page.pages(found)
    row = "| C1 | it | +1.17 [+0.45, +1.88] | confirmed |"
    assert row in page.verdicts([claim], found)
    own = shown["evidence/pages/C1.md"]
    assert (
        "**C1: confirmed.** it: +1.17 [+0.45, +1.88] over 3 seeds; expected above 0.\n\nAs in [ptq](../../docs/ptq.md)."
        in own
    )
    assert "| New | 62.17 ± 1.26 | 3 |\n| Older | 61.00 ± 1.00 | 3 |\n| not run | – | 0 |" in own
    assert "![top-1, % over bits: New, Old](figures/a.svg)" in own
    assert "records: [evidence/records/C1.jsonl](../records/C1.jsonl)" in own
    points, (curve,) = (
        drawing.gather(claim, claim.figures[0], found),
        drawing.gather(claim, claim.figures[1], found).series.values(),
    )
    assert [(name, point.x, point.values) for name, (point,) in points.series.items()] == [
        ("New", 2, (61.0, 62.0, 63.5)),
        ("Old", 2, (60.0, 61.0, 62.0)),
    ]
    assert [(point.x, point.mean) for point in curve] == [(0.0, 1.0), (2.0, 3.0)]
    drawing.write(claim.figures[0], points, tmp_path)
    first = (tmp_path / "a.svg").read_bytes()
    drawing.write(claim.figures[0], points, tmp_path)
    assert (tmp_path / "a.svg").read_bytes() == first


def test_pairs_on_two_types_of_cpu_are_marked(tmp_path):
    why = "{new.top1} {new.top1 - old.top1}, {new.top1 - mean old.top1:interval}"
    made.claim(tmp_path, expect=[EXPECT], why=why)
    made.runs(tmp_path, "new", [61.0, 62.0, 63.5])
    made.runs(tmp_path, "old", [60.0, 61.0, 62.0], machine="Some CPU, 4 cores")
    found, claim = made.evidence(tmp_path)
    assert MIXED not in page.verdicts([claim], found) + page.section(claim, found)
    made.record(tmp_path, arm="old", seed=2, metrics={"top1": 62.0}, machine="Another CPU")
    found, claim = made.evidence(tmp_path)
    assert "]\\* |" in page.verdicts([claim], found)
    text = page.section(claim, found)
    assert "62.17 ± 1.26 +1.17 ± 0.29\\*, +1.17 [-1.96, +4.29]\\*" in text
    assert page.MIXED_NOTE in text


def test_differences_by_image_are_means_over_seeds_that_know_their_images(tmp_path):
    made.claim(tmp_path, why="{new.top1 - old.top1:images}")
    right = {"new": [0b11110000, 0b11110000, 0b11111111], "old": [0b11100000, 0b11111100, None]}
    for arm, all_hits in right.items():
        for seed, hits in enumerate(all_hits):
            correct = base64.b64encode(bytes([hits])).decode() if hits is not None else None
            made.record(tmp_path, arm=arm, seed=seed, metrics={"top1": 50.0}, correct=correct)
    found, claim = made.evidence(tmp_path)
    by_image = [0.0, 0.0, 0.0, 50.0, -50.0, -50.0, 0.0, 0.0]
    assert found.differences_by_image(claim, "new", "old") == by_image
    low, high = stats.t.interval(0.95, 7, np.mean(by_image), stats.sem(by_image))
    assert found.filled(claim, claim.why) == f"-6.25 [{low:+.2f}, {high:+.2f}]"


def test_a_figure_has_other_colours_on_dark_pages():
    drawn = (ROOT / "docs" / "figures" / "accuracy-bits.svg").read_text()
    style = drawn.partition("prefers-color-scheme: dark")[2].partition("</style>")[0]
    assert {"#ffffff", "#000000", "#0072b2"} <= set(
        re.findall(r"(?:fill|stroke): (#\w{6})\"]", style)
    )
    assert "#000000" in drawn.partition("</style>")[2]


def test_what_is_no_claim_is_named(tmp_path):
    path = made.claim(tmp_path, kind=1)
    with usage_error(f"^{path}: must be a claim .*'kind'"):
        made.evidence(tmp_path)
