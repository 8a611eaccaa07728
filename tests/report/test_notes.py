"""What a page warns of. Oracle: run directories made to have exactly one fault."""

import json

import pytest

from qat.report.notes import Note, grouped, notes_of
from qat.report.run_files import read_run
from tests.report.pages import RESULTS, origin


def notes(folder, results=None, **files):
    """Levels, places and texts of a directory with these files; a sound `results.json` unless another one is given."""
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(RESULTS if results is None else results))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return notes_of(read_run(folder, origin()))


def test_a_sound_run_has_none(tmp_path):
    assert notes(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "level", "said", "advised"),
    [
        ({"error": "no such file"}, "error", "no such file", "had written by then"),
        # Two standard deviations of a share of 30 % in 100 images: 2 * sqrt(0.3 * 0.7 / 100) = 9.17 points.
        (
            {"top1": 39.0, "images": 100, "majority_share": 30.0},
            "warning",
            "most frequent class gives 30.00 %, and chance up to 39.17 %",
            "eval.py",
        ),
        ({"top1": 80.0}, "warning", "10.0 points of top-1 are lost", "loss=kd"),
        ({"top1": 80.0, "command": "ptq"}, "warning", "10.0 points of top-1 are lost", "train.py ckpt="),
        ({"split": "val"}, "note", "no test split", "Keep images apart"),
        ({"search": {"accepted": 0}}, "note", "No candidate was better", "search.radius"),
        ({"search": {"accepted": 1, "selected_on": "validation"}}, "warning", "is no estimate", "reference_selection=false"),
    ],
)
def test_results(tmp_path, changes, level, said, advised):
    (found,) = notes(tmp_path, RESULTS | changes)
    assert found.level == level
    assert said in found.what
    assert advised in found.advice


@pytest.mark.parametrize(
    "facts",
    [
        {"top1": 39.2, "images": 100, "majority_share": 30.0},
        {"top1": 31.0, "images": 100_000, "majority_share": 30.0},  # so many images tell it apart
        {"top1": 30.0},  # of an older file, which says neither
    ],
)
def test_an_accuracy_that_is_more_than_the_most_frequent_class(tmp_path, facts):
    assert notes(tmp_path, RESULTS | {"top1_fp": None} | facts) == []


def test_accuracy_that_falls_in_the_end(tmp_path):
    (found,) = notes(tmp_path, metrics__csv="step,val/top1\n1,50.0\n2,90.0\n3,80.0\n")
    assert "from 90.00 % to 80.00 %" in found.what


def test_a_run_that_was_resumed(tmp_path):
    (found,) = notes(tmp_path, train__log="[INFO] resumed at step 38 from x\n[INFO] resumed at step 76 from x\n")
    assert found.what.startswith("Resumed at step 38, 76")


def test_layers_that_oscillate(tmp_path):
    table = "layer,role,weights,oscillating\na,weight,100,11\nb,qk,100,50\nc,weight,100,10\n"
    assert [(note.where, note.what.partition(" o")[0]) for note in notes(tmp_path, oscillation__csv=table)] == [
        ("a", "11 %"),
        ("b", "50 %"),
    ]


def test_analyses_that_were_interrupted_and_what_they_warn_of(tmp_path):
    worry = {"where": "head", "what": "dead offsets", "advice": "leave them out"}
    index = {"analysis": "weights", "complete": False, "warnings": [worry], "tables": [], "figures": []}
    found = notes(tmp_path, weights__json=json.dumps(index))
    assert [note.where for note in found] == ["weights", "head"]
    assert found[1] == Note("warning", "head", "dead offsets", "leave them out")


def test_errors_are_first(tmp_path):
    table = "layer,role,weights,oscillating\na,weight,100,11\n"
    found = notes(tmp_path, RESULTS | {"error": "x", "split": "val"}, oscillation__csv=table)
    assert [note.level for note in found] == ["error", "warning", "note"]


def test_notes_with_the_same_advice_are_one_entry(tmp_path):
    same = [Note("warning", f"layer{i}", "is bad", "Change it.") for i in range(3)]
    other = Note("note", "", "x", "Nothing.")
    assert grouped([*same[:2], other, same[2]]) == [(("warning", "Change it."), same), (("note", "Nothing."), [other])]
