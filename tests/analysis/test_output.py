"""Files of an analysis. Oracle: readers of the formats."""

import csv
import json
import math
import xml.etree.ElementTree as ET

from PIL import Image

from qat.analysis import Drawing, Outcome, Table, write_outcome
from qat.analysis.style import axes, figure


def outcome():
    made = figure()
    axes(made, "ratio", "top-1 (%)").plot([0.7, 1, 1.3], [10, 90, 20])
    rows = [{"net": "a, b", "ratio": 0.7, "top-1 (%)": 10.25}, {"net": 'say "c"', "ratio": 1.0, "loss": math.nan}]
    drawing = Drawing("curve", "A curve", "Falls from 90 % to 10 %.", made)
    return Outcome({"a": {"mean": math.inf}}, [Table("steps", "Steps", rows)], [drawing])


def test_the_index_names_what_is_there(tmp_path):
    write_outcome(tmp_path, "robustness", {"low": 0.7}, outcome())
    index = json.loads((tmp_path / "robustness.json").read_text())
    assert index["analysis"] == "robustness"
    assert (index["settings"], index["summary"]) == ({"low": 0.7}, {"a": {"mean": None}})
    assert index["tables"] == [{"file": "steps.csv", "title": "Steps"}]
    assert index["figures"] == [{"file": "curve.svg", "png": "curve.png", "title": "A curve", "alt": "Falls from 90 % to 10 %."}]
    assert {path.name for path in tmp_path.iterdir()} == {"robustness.json", "steps.csv", "curve.svg", "curve.png"}


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
    words = {element.text for element in root.iter() if element.tag.endswith(("}text", "}title", "}description"))}
    assert {"ratio", "top-1 (%)", "A curve", "Falls from 90 % to 10 %."} <= words
    assert 1000 < Image.open(tmp_path / "one" / "curve.png").width <= 1100  # 7.2 inches, 150 pixels each
    for name in ("curve.svg", "curve.png"):  # the same picture is the same file
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
