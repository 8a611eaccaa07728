"""Files of an analysis. Oracle: readers of the formats."""

import csv
import json
import math
import xml.etree.ElementTree as ET

from PIL import Image

from qat.analysis import Advice, Drawing, Outcome, Table, write_outcome
from qat.analysis.style import axes, figure
from qat.utils.files import csv_text


def drawing(name="curve"):
    made = figure()
    axes(made, "ratio", "top-1 (%)").plot([0.7, 1, 1.3], [10, 90, 20])
    return Drawing(name, "A curve", "Falls from 90 % to 10 %.", made)


def outcome():
    rows = [{"net": "a, b", "ratio": 0.7, "top-1 (%)": 10.25}, {"net": 'say "c"', "ratio": 1.0, "loss": math.nan}]
    return Outcome({"a": {"mean": math.inf}}, [Table("steps", "Steps", rows)], [drawing()], [Advice("a", "falls", "raise it")])


def test_the_index_names_what_is_there(tmp_path):
    write_outcome(tmp_path, "robustness", {"low": 0.7}, outcome(), complete=False)
    index = json.loads((tmp_path / "robustness.json").read_text())
    assert index == {
        "analysis": "robustness",
        "complete": False,
        "settings": {"low": 0.7},
        "summary": {"a": {"mean": None}},
        "tables": [{"file": "steps.csv", "title": "Steps"}],
        "figures": [{"file": "curve.svg", "png": "curve.png", "title": "A curve", "alt": "Falls from 90 % to 10 %."}],
        "warnings": [{"where": "a", "what": "falls", "advice": "raise it"}],
    }
    assert {path.name for path in tmp_path.iterdir()} == {"robustness.json", "steps.csv", "curve.svg", "curve.png"}


def test_a_table_reads_back(tmp_path):
    write_outcome(tmp_path, "robustness", {}, outcome())
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"net": "a, b", "ratio": "0.7", "top-1 (%)": "10.25", "loss": ""},
        {"net": 'say "c"', "ratio": "1.0", "top-1 (%)": "", "loss": "nan"},
    ]
    assert csv_text([]) == "\n"


def test_a_picture_is_text_with_its_words_and_a_png_of_its_width(tmp_path):
    write_outcome(tmp_path, "robustness", {}, outcome())
    root = ET.parse(tmp_path / "curve.svg").getroot()
    words = {element.text for element in root.iter() if element.tag.endswith(("}text", "}title", "}description"))}
    assert {"ratio", "top-1 (%)", "A curve", "Falls from 90 % to 10 %."} <= words
    assert 1000 < Image.open(tmp_path / "curve.png").width <= 1100  # 7.2 inches, 150 pixels each


def test_the_same_picture_is_the_same_file(tmp_path):
    for folder in ("one", "two"):
        write_outcome(tmp_path / folder, "robustness", {}, Outcome({}, drawings=[drawing()]))
    for name in ("curve.svg", "curve.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_outcome_replaces_the_one_before(tmp_path):
    write_outcome(tmp_path, "robustness", {}, outcome(), complete=False)
    write_outcome(tmp_path, "robustness", {}, Outcome({"a": 1}))
    index = json.loads((tmp_path / "robustness.json").read_text())
    assert (index["complete"], index["summary"], index["tables"]) == (True, {"a": 1}, [])
