"""Atomic files. Oracle: what a reader finds afterwards."""

import contextlib
import json
import math
import os
import resource
import signal

import pytest
import torch

from qat.utils.files import damage_of, json_text, read_torch, remove_unfinished, replacing, write_text, write_torch


def test_a_new_file_appears_whole(tmp_path):
    write_text(tmp_path / "a" / "b" / "note.txt", "grüß\n")
    assert (tmp_path / "a" / "b" / "note.txt").read_bytes() == "grüß\n".encode()


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "x.pt"
    write_torch(path, {"a": torch.zeros(2)})
    write_torch(path, {"a": torch.ones(3)})
    assert torch.load(path, weights_only=True)["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_the_file_that_is_replaced_stays_under_another_name(tmp_path):
    path = tmp_path / "last.ckpt"
    for content in ("one", "two", "three"):
        with replacing(path, previous="last.prev.ckpt") as temporary:
            temporary.write_text(content)
    assert (path.read_text(), (tmp_path / "last.prev.ckpt").read_text()) == ("three", "two")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_keeps_both(tmp_path):
    path = tmp_path / "last.ckpt"
    for content in ("one", "two"):
        with replacing(path, previous="last.prev.ckpt") as temporary:
            temporary.write_text(content)
    with pytest.raises(OSError, match="disk full"), replacing(path, previous="last.prev.ckpt"):
        raise OSError("disk full")
    assert (path.read_text(), (tmp_path / "last.prev.ckpt").read_text()) == ("two", "one")


@contextlib.contextmanager
def room(size):
    """No file can grow beyond `size` bytes: the system's own refusal, like that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_text(path, "x" * 20000),
        lambda path: write_torch(path, {"a": torch.ones(20000)}),
    ],
)
def test_without_room_the_error_names_the_file(write, tmp_path):
    with room(10000), pytest.raises(OSError, match="File too large") as error:
        write(tmp_path / "out")
    assert error.value.filename == str(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name != "out"] == []


def die_writing(folder):
    """Another process is killed in the middle of a write."""
    if (pid := os.fork()) == 0:
        with replacing(folder / "last.ckpt") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_what_killed_writes_have_left_is_removed(tmp_path):
    die_writing(tmp_path)
    (left,) = tmp_path.iterdir()
    (tmp_path / ".last.prev.ckpt.123.part").write_text("a link")
    (tmp_path / ".mine").write_text("x")
    assert {p.name for p in remove_unfinished([tmp_path, tmp_path / "none"])} == {left.name, ".last.prev.ckpt.123.part"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine"]


def read(path):
    """What a file holds, None where it is refused."""
    try:
        return read_torch(path)
    except Exception:
        return None


def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path):
    content, path = {"a": torch.arange(64.0), "b": "text"}, tmp_path / "x.ckpt"
    write_torch(path, content)
    whole = path.read_bytes()
    assert damage_of(path) is None
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 5)]
    cut = [whole[:length] for length in range(0, len(whole), 41)]
    found = []
    for damaged in [*flipped, *cut]:
        path.write_bytes(damaged)
        found.append(read(path))
    assert found[len(flipped) :] == [None] * len(cut)
    # Nothing depends on some of the bits, as those of the time of day.
    as_it_was = [one for one in found if one is not None]
    assert len(as_it_was) < len(flipped) / 2
    assert all(one.keys() == content.keys() and torch.equal(one["a"], content["a"]) and one["b"] == "text" for one in as_it_was)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        (1.5, 1.5),
        (True, True),
        ("nan", "nan"),
        ({"a": [math.nan, (1, {"b": math.inf})]}, {"a": [None, [1, {"b": None}]]}),
    ],
)
def test_numbers_that_json_has_not(value, expected):
    assert json.loads(json_text(value)) == expected
