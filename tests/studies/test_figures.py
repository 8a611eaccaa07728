"""Pictures. Oracle: points worked out by hand; the artists of the drawing; bytes of a second drawing."""

import re

import matplotlib as mpl
import pytest

from qat.errors import UsageError
from studies import drawing
from tests.studies import made

LINES = {"file": "c01-a.svg", "kind": "lines", "metric": "top1", "x": "bits", "y": "top-1, %"}
SERIES = {"New": {2: "new", 3: "idle"}, "Old": {2: "old"}, "Idle": {2: "idle"}}
CURVE = {"file": "c01-b.svg", "kind": "curves", "curve": "osc", "x": "step", "y": "%", "series": {"New": "new", "Idle": "idle"}}
MAP = {"file": "c01-c.svg", "kind": "map", "curve": "loss", "x": "first", "y": "second", "series": {"New": "new", "Old": "old"}}
ARMS = made.ARMS | {"idle": {"label": "Idle"}}
HEIGHTS = {"x": [0.0, 1.0], "y": [0.0, 1.0, 2.0], "z": [[1.0, 2.0], [3.0, None], [2.0, 4.0]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three seeds of one arm, one of another, none of the third."""
    root = tmp_path_factory.mktemp("figures")
    for seed, curve in enumerate(([[0, 1.0], [10, 2.0]], [[0, 3.0], [10, 4.0], [20, 5.0]], [])):
        made.record(
            root, arm="new", seed=seed, metrics={"top1": 60.0 + seed}, curves={"osc": curve}, maps={"loss": HEIGHTS} if seed else {}
        )
    made.record(root, arm="old", metrics={"top1": 50.0})
    return root


def gathered(folder, spec):
    made.claim(folder, arms=ARMS, figures=[spec])
    evidence = made.evidence(folder)
    claim = evidence.claims["C1"]
    return claim, claim.figures[0], evidence, drawing.gather(claim, claim.figures[0], evidence)


def test_lines(folder):
    *_, figure, evidence, found = gathered(folder, LINES | {"series": SERIES, "reference": {"best": "new", "none": "idle"}})
    assert list(found.series) == ["New", "Old"]
    (new,) = found.series["New"]
    assert (new.x, new.values, new.mean, new.around) == (2, (60.0, 61.0, 62.0), 61.0, 1.0)
    assert (found.series["Old"][0].around, list(found.reference)) == (0.0, ["best"])
    (axis,) = drawing.draw(figure, found).axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("bits", "top-1, %")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["2"]
    dots = next(line for line in axis.lines if len(line.get_ydata()) == 3)
    assert list(dots.get_ydata()) == [60.0, 61.0, 62.0]
    bars = [container.lines[2][0].get_segments()[0][:, 1].tolist() for container in axis.containers]
    assert bars == [[60.0, 62.0], [50.0, 50.0]]
    assert [spine for spine in axis.spines if axis.spines[spine].get_visible()] == ["left", "bottom"]


def test_a_scatter_lies_along_another_metric(tmp_path):
    for arm, seconds, top1 in (("new", (8.0, 12.0), (60.0, 62.0)), ("old", (1.0,), (50.0,))):
        for seed, (cost, value) in enumerate(zip(seconds, top1, strict=True)):
            made.record(tmp_path, arm=arm, seed=seed, metrics={"top1": value, "wall_seconds": cost})
    spec = LINES | {"kind": "scatter", "along": "wall_seconds", "series": {"W4": {"slow": "new", "fast": "old", "never": "idle"}}}
    *_, figure, _, found = gathered(tmp_path, spec)
    assert [(point.name, point.x, point.mean) for point in found.series["W4"]] == [("slow", 10.0, 61.0), ("fast", 1.0, 50.0)]
    (axis,) = drawing.draw(figure, found).axes
    assert axis.get_xscale() == "log"
    assert list(axis.lines[0].get_xdata()) == [1.0, 10.0]
    assert {text.get_text() for text in axis.texts} == {"slow", "fast"}


@pytest.mark.parametrize(
    ("places", "at"),
    [
        ([2, 3, 4], [2.0, 3.0, 4.0]),
        (["1e-5", "1e-4", 0.001], [-5.0, -4.0, -3.0]),
        (["mse", "kl"], [0.0, 1.0]),
        ([3, 2], [2.0, 3.0]),
    ],
)
def test_places_along_x(places, at):
    series = {"a": [drawing.Point(x, (1.0,)) for x in places]}
    assert list(drawing._places(series).values()) == pytest.approx(at)


def test_curves(folder):
    _, figure, _, found = gathered(folder, CURVE | {"reference": {"best": "old"}})
    (curve,) = found.series.values()
    assert len(curve.seeds) == 2
    assert [(point.x, point.mean) for point in curve.points] == [(0.0, 2.0), (10.0, 3.0)]
    assert found.reference["best"].values == (50.0,)
    (axis,) = drawing.draw(figure, found).axes
    assert [list(line.get_ydata()) for line in axis.lines[:3]] == [[1.0, 2.0], [3.0, 4.0, 5.0], [2.0, 3.0]]
    assert list(axis.lines[-1].get_ydata()) == [50.0, 50.0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "10"]


def test_maps(folder):
    _, figure, _, found = gathered(folder, MAP)
    (one,) = found.series.values()
    assert (one.seed, one.maps["loss"]["z"][1]) == (1, [3.0, None])
    panel, bar = drawing.draw(figure, found).axes
    assert (panel.get_title(loc="left"), panel.get_xlabel(), bar.get_ylabel()) == ("New", "first", "loss, seed 1")


@pytest.mark.parametrize("spec", [LINES | {"series": SERIES}, CURVE, MAP], ids=lambda spec: spec["kind"])
def test_a_second_drawing_has_the_same_bytes(folder, tmp_path, spec):
    claim, figure, evidence, _ = gathered(folder, spec)
    first = drawing.write(claim, figure, evidence, tmp_path).read_bytes()
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 20}):
        assert drawing.write(claim, figure, evidence, tmp_path).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [figure.file]
    assert b"date" not in first
    assert not re.search(rb"Matplotlib|<text", first)


@pytest.mark.parametrize("series", [{"Idle": {2: "idle"}}, {"New": {2: "new"}}])
def test_nothing_to_draw(folder, tmp_path, series):
    made.claim(folder, arms=ARMS, figures=[LINES | {"series": series, "metric": "top5"}])
    evidence = made.evidence(folder)
    claim = evidence.claims["C1"]
    if "Idle" in series:
        assert not drawing.gather(claim, claim.figures[0], evidence).series
        assert drawing.write(claim, claim.figures[0], evidence, tmp_path) is None
    else:
        with pytest.raises(UsageError, match=f"^{claim.file}: figure c01-a.svg: top5 must be in a run of its arms$"):
            drawing.gather(claim, claim.figures[0], evidence)
