"""A search that was killed goes on to the same scales, bit for bit. Oracle: the search that was not."""

import csv
import logging

import pytest
import torch

from qat.errors import UsageError
from qat.ptq.search import search
from qat.ptq.search_settings import SearchSettings
from qat.ptq.state import SearchFiles
from tests.ptq.searching import batches, changed, quantized, state

KNOBS = {"passes": 3, "micro_batch": 3, "radius": 0.05, "relative": True}


class Killed(BaseException):
    pass


def lines(folder):
    with (folder / "search.csv").open() as file:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]


def killed_after(monkeypatch, visits, *, before_state):
    """Die when that many visits are done: before the state is written, or behind it."""
    original = SearchFiles.write

    def write(self, done):
        if done.visits == visits and before_state:
            raise Killed
        original(self, done)
        if done.visits == visits:
            raise Killed

    monkeypatch.setattr(SearchFiles, "write", write)


# A method with gradients visits all blocks at once.
@pytest.mark.parametrize(
    ("method", "visits", "before_state"),
    [
        ("evolution", 1, False),
        ("evolution", 3, True),
        ("adam", 2, True),
        *(pytest.param("evolution", visits, False, marks=pytest.mark.long) for visits in (4, 6)),
        *(pytest.param("adam", visits, False, marks=pytest.mark.long) for visits in (1, 3)),
    ],
)
def test_same_scales_after_a_kill(method, visits, before_state, tmp_path, monkeypatch):
    chosen = SearchSettings(method=method, racing=6, **KNOBS)
    whole, targets = quantized()
    expected = search(whole, batches(), targets, chosen, run_dir=tmp_path / "whole")
    net, _ = quantized()
    killed_after(monkeypatch, visits, before_state=before_state)
    with pytest.raises(Killed):
        search(net, batches(), targets, chosen, run_dir=tmp_path / "killed")
    monkeypatch.undo()
    fresh, _ = quantized()
    found = search(fresh, batches(), targets, chosen, run_dir=tmp_path / "killed", resume=True)
    assert changed(state(whole), fresh) == set()
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert {**found.to_dict(), "seconds": 0} == {**expected.to_dict(), "seconds": 0}


def test_a_finished_search_is_not_run_again(tmp_path, monkeypatch):
    chosen, (net, targets) = SearchSettings(**KNOBS), quantized()
    expected = search(net, batches(), targets, chosen, run_dir=tmp_path)
    monkeypatch.setattr("qat.ptq.search.DRIVERS", {})
    again, _ = quantized()
    assert search(again, batches(), targets, chosen, run_dir=tmp_path, resume=True) == expected
    assert changed(state(net), again) == set()


def test_the_choice_of_validation_survives_a_kill(tmp_path, monkeypatch):
    chosen, targets = SearchSettings(reference_selection=True, **KNOBS), quantized()[1]

    def accuracies(*values):
        left = iter(values)
        return lambda: next(left)

    whole = quantized()[0]
    search(whole, batches(), targets, chosen, validate=accuracies(1.0, 2.0, 9.0, 3.0, 4.0, 5.0))
    killed_after(monkeypatch, 4, before_state=False)
    with pytest.raises(Killed):
        search(quantized()[0], batches(), targets, chosen, run_dir=tmp_path, validate=accuracies(1.0, 2.0, 9.0, 3.0))
    monkeypatch.undo()
    net = quantized()[0]
    result = search(net, batches(), targets, chosen, run_dir=tmp_path, resume=True, validate=accuracies(4.0, 5.0))
    assert result.selected_on == "validation"
    assert changed(state(whole), net) == set()


def test_without_resume_it_starts_again(tmp_path, caplog):
    chosen, targets = SearchSettings(**KNOBS), quantized()[1]
    search(quantized()[0], batches(), targets, chosen, run_dir=tmp_path)
    before = lines(tmp_path)
    with caplog.at_level(logging.INFO):
        search(quantized()[0], batches(), targets, chosen, run_dir=tmp_path)
    assert lines(tmp_path) == before
    assert "resumed" not in caplog.text


def test_resume_demands_the_same_search(tmp_path):
    targets = quantized()[1]
    search(quantized()[0], batches(), targets, SearchSettings(**KNOBS), run_dir=tmp_path)
    with pytest.raises(UsageError, match=r"search\.cycles=5: the run to resume has 3 \(.*search\.ckpt\)"):
        search(quantized()[0], batches(), targets, SearchSettings(cycles=5, **KNOBS), run_dir=tmp_path, resume=True)
    with pytest.raises(UsageError, match="of a net, or of calibration images, with other values"):
        search(quantized()[0], [b + 1 for b in batches()], targets, SearchSettings(**KNOBS), run_dir=tmp_path, resume=True)
    (tmp_path / "search.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"search\.ckpt cannot be read; delete it"):
        search(quantized()[0], batches(), targets, SearchSettings(**KNOBS), run_dir=tmp_path, resume=True)


def test_every_evaluation_is_a_line(tmp_path):
    chosen, (net, targets) = SearchSettings(**KNOBS), quantized()
    result = search(net, batches(), targets, chosen, run_dir=tmp_path)
    found = lines(tmp_path)
    assert [line["cycle"] for line in found] == ["incumbent", *(["0", "1", "2"] * 6)]
    assert [line["block"] for line in found[1::3]] == ["blocks.1", "blocks.0"] * 3
    assert [line["pass"] for line in found[1::3]] == list("001122")
    assert float(found[0]["fitness"]) == result.fitness_before
    assert min(float(line["fitness"]) for line in found) == result.fitness
    assert {line["images"] for line in found} == {"21"}
    content = torch.load(tmp_path / "search.ckpt", weights_only=True)
    assert content["fitness"] == result.fitness
    assert content["visits"] == 6
