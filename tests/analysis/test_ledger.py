"""Evaluations on the disk. Oracle: what was put in, and the bytes of the file."""

import json

import pytest

from qat.analysis import Ledger
from qat.errors import UsageError

KEYS = [{"net": "a", "ratio": 0.7}, {"net": "a", "ratio": 1.3}, {"net": "b", "ratio": 0.7}]


def filled(folder, inputs="x"):
    ledger = Ledger(folder, inputs, resume=False)
    for number, key in enumerate(KEYS):
        assert ledger.record(key, {"top1": float(number)}) == {**key, "top1": float(number)}
    return folder / "points.jsonl"


def test_each_line_is_on_the_disk_at_once(tmp_path):
    ledger = Ledger(tmp_path, "x", resume=False)
    for number, key in enumerate(KEYS):
        assert ledger.row(key) is None
        ledger.record(key, {"top1": number})
        lines = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()]
        assert lines[0] == {"inputs": "x"}
        assert lines[1:] == [{"key": k, "values": {"top1": n}} for n, k in enumerate(KEYS[: number + 1])]
    assert len(ledger) == 3


def test_what_is_there_is_found_again_whatever_the_order_of_words(tmp_path):
    filled(tmp_path)
    again = Ledger(tmp_path, "x", resume=True)
    assert len(again) == 3
    assert again.row({"ratio": 1.3, "net": "a"}) == {"net": "a", "ratio": 1.3, "top1": 1.0}
    assert again.row({"net": "a", "ratio": 1.0}) is None
    assert again.row({"net": "a"}) is None


def test_without_resume_it_starts_anew(tmp_path):
    path = filled(tmp_path)
    assert len(Ledger(tmp_path, "x", resume=False)) == 0
    assert path.read_text() == '{"inputs": "x"}\n'


def test_without_a_file_resume_starts(tmp_path):
    assert len(Ledger(tmp_path / "new", "x", resume=True)) == 0
    assert (tmp_path / "new" / "points.jsonl").read_text() == '{"inputs": "x"}\n'


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_that_was_being_written_is_done_again(tmp_path, cut):
    path = filled(tmp_path)
    whole = path.read_text()
    path.write_text(whole[:-cut])
    ledger = Ledger(tmp_path, "x", resume=True)
    assert len(ledger) == 2
    assert ledger.row(KEYS[2]) is None
    ledger.record(KEYS[2], {"top1": 2.0})
    assert path.read_text() == whole


@pytest.mark.parametrize("inputs", ["y", "", "x "])
def test_other_inputs_are_refused_and_left_alone(tmp_path, inputs):
    path = filled(tmp_path)
    before = path.read_bytes()
    with pytest.raises(UsageError) as error:
        Ledger(tmp_path, inputs, resume=True)
    assert str(error.value) == f"resume: {path} is of another net, other images or other settings; resume=false starts anew"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"nonsense\n",
        b"\xff\xfe\x00\n",
        b"[1]\n",
        b'{"other": 1}\n',
        b'{"inputs": "x"}\n{"key": {"net": "a"}}\n',
        b'{"inputs": "x"}\n{"key": {"net": "a"}, "values": 3}\n',
        b'{"inputs": "x"}\n{"key": 3, "values": {}}\n',
        b'{"inputs": "x"}\nnonsense\n{"key": {}, "values": {}}\n',
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content):
    path = tmp_path / "points.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        Ledger(tmp_path, "x", resume=True)
    assert str(error.value) == f"resume: {path} cannot be read; resume=false starts anew"
    assert path.read_bytes() == content
