"""Evaluations of changed nets on images, and files. Oracle: accuracy counted here over all images at once, readers of the formats."""

import contextlib
import csv
import json
import logging
import math
import xml.etree.ElementTree as ET

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from qat.analysis import (
    Drawing,
    EvaluationPoint,
    ImageSet,
    Outcome,
    Table,
    analysis,
    measure,
    write_outcome,
)
from qat.analysis.analysis import panels
from qat.data import Digits
from tests import tiny
from tests.analysis.common import image_set, is_as_before, state
from tests.data.files import DIGITS


def points_of(net, shifts):
    """The net with a head whose bias is shifted by hand, undone by hand."""

    @contextlib.contextmanager
    def shifted(by):
        before = net.head.bias.data.clone()
        net.head.bias.data[0] += by
        try:
            yield
        finally:
            net.head.bias.data.copy_(before)

    return [
        EvaluationPoint({"net": "a", "shift": by}, net, lambda by=by: shifted(by)) for by in shifts
    ]


def test_rows_come_in_the_order_of_the_points(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(analysis, "SECONDS_BETWEEN_LINES", -1)
    net, images = tiny.vit(), image_set()
    rows = measure(points_of(net, [0, 64, 8]), images)
    assert [row["shift"] for row in rows] == [0, 64, 8]
    assert rows[0]["loss"] == images.score(net)["loss"]
    net.head.bias.data[0] += 64
    assert rows[1]["loss"] == images.score(net)["loss"]
    assert rows[0].keys() == {"net", "shift", "top1", "loss"}
    assert "3 evaluations of 16 test images" in caplog.text
    assert "2 of 3 evaluations, about " in caplog.text


def test_a_point_that_fails_leaves_the_net():
    net = tiny.vit()
    before = state(net)

    def fails(net):
        raise KeyboardInterrupt

    (shifted,) = points_of(net, [16])
    with pytest.raises(KeyboardInterrupt):
        measure([EvaluationPoint({"net": "a"}, net, shifted.change, score=fails)], image_set())
    assert is_as_before(net, before)


def test_modes_are_kept_and_evaluations_are_in_eval_mode():
    net, images = tiny.vit(drop_rate=0.5), image_set()
    expected = images.score(net)["loss"]
    net.train()
    net.blocks[0].eval()
    modes = [module.training for module in net.modules()]
    (found,) = measure([EvaluationPoint({"net": "a"}, net)], images)
    assert found["loss"] == expected
    assert [module.training for module in net.modules()] == modes


def whole(images):
    return (torch.cat(parts) for parts in zip(*images.batches, strict=True))


@pytest.mark.parametrize("batch", [1, 7, 24, 100])
def test_scores_do_not_depend_on_batches(batch):
    net, images = tiny.vit(), image_set(24, batch)
    found, (x, target) = images.score(net), whole(images)
    logits = tiny.logits(net, x)
    assert found["top1"] == pytest.approx(100 * (logits.argmax(-1) == target).float().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)


def test_logits_in_half_precision_are_counted_in_single():
    logits = torch.tensor([[300.0, 0.0], [0.0, 1.0]], dtype=torch.float16)
    images = ImageSet([(torch.zeros(2, 1, 2, 2), torch.tensor([1, 1]))], "test")
    found = images.score(lambda _: logits)
    assert (found["top1"], found["loss"]) == (
        50.0,
        pytest.approx((300 + torch.log1p(torch.exp(torch.tensor(-1.0)))).item() / 2),
    )


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (4, [0, 90, 180, 270]),
        (7, [i * 360 // 7 for i in range(7)]),
        (360, range(360)),
        (9999, range(360)),
    ],
)
def test_a_sample_is_spread_over_its_split(count, expected):
    data = Digits(**DIGITS, batch_size=64)
    images = ImageSet([*data.sample("test", count)], "test")
    everything = torch.cat([x for x, _ in data.test_dataloader()])
    x, target = whole(images)
    assert torch.equal(x, everything[list(expected)])
    assert torch.equal(target, torch.cat([t for _, t in data.test_dataloader()])[list(expected)])


def outcome():
    made, (axis,) = panels()
    axis.set(xlabel="ratio", ylabel="top-1 (%)")
    axis.set_yticks([10, 90], [r"a$\no$", "$b$"])
    axis.plot([0.7, 1, 1.3], [10, 90, 20])
    rows = [
        {"net": "a, b", "ratio": 0.7, "top-1 (%)": 10.25},
        {"net": 'say "c"', "ratio": 1.0, "loss": math.nan},
    ]
    drawing = Drawing("curve", "A curve", "Falls from 90 % to 10 %.", made)
    return Outcome({"a": {"mean": math.inf}}, [Table("steps", "Steps", rows)], [drawing])


def test_the_index_names_what_is_there(tmp_path):
    write_outcome(tmp_path, "robustness", {"low": 0.7}, outcome())
    index = json.loads((tmp_path / "robustness.json").read_text())
    assert index["analysis"] == "robustness"
    assert (index["settings"], index["summary"]) == ({"low": 0.7}, {"a": {"mean": None}})
    assert index["tables"] == [{"file": "steps.csv", "title": "Steps"}]
    assert index["figures"] == [
        {"file": "curve.svg", "title": "A curve", "alt": "Falls from 90 % to 10 %."}
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        "robustness.json",
        "steps.csv",
        "curve.svg",
        "curve.png",
    }


def test_a_table_reads_back(tmp_path):
    write_outcome(tmp_path, "robustness", {}, outcome())
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"net": "a, b", "ratio": "0.7", "top-1 (%)": "10.25", "loss": ""},
        {"net": 'say "c"', "ratio": "1.0", "top-1 (%)": "", "loss": "nan"},
    ]


def test_a_picture_is_text_with_its_words_and_a_png_of_its_width(tmp_path):
    for folder in ("one", "two"):
        write_outcome(tmp_path / folder, "robustness", {}, outcome())
    root = ET.parse(tmp_path / "one" / "curve.svg").getroot()
    words = {
        element.text
        for element in root.iter()
        if element.tag.endswith(("}text", "}title", "}description"))
    }
    assert {"ratio", "top-1 (%)", r"a$\no$", "$b$", "A curve", "Falls from 90 % to 10 %."} <= words
    assert (
        1000 < Image.open(tmp_path / "one" / "curve.png").width <= 1100
    )  # 7.2 inches, 150 pixels each
    for name in ("curve.svg", "curve.png"):  # the same picture is the same file
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
