"""Atomic files. Oracle: the files after each write."""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import pickle
import resource
import signal
import zipfile

import pytest
import torch

from qat.utils.files import (
    csv_lines,
    csv_rows,
    csv_text,
    find_damage,
    json_text,
    read_torch,
    remove_unfinished,
    replace_atomically,
    write_text,
    write_torch,
)


def test_a_new_file_appears_whole(tmp_path):
    write_text(tmp_path / "a" / "b" / "note.txt", "grüß\n")
    assert (tmp_path / "a" / "b" / "note.txt").read_bytes() == "grüß\n".encode()


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write():
        with replace_atomically(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_the_file_that_is_replaced_stays_under_another_name(tmp_path):
    path = tmp_path / "last.ckpt"
    for content in ("one", "two", "three"):
        with replace_atomically(path, previous="last.prev.ckpt") as temporary:
            temporary.write_text(content)
    with (
        pytest.raises(OSError, match="disk full"),
        replace_atomically(path, previous="last.prev.ckpt"),
    ):
        raise OSError("disk full")
    assert (path.read_text(), (tmp_path / "last.prev.ckpt").read_text()) == ("three", "two")
    assert len(list(tmp_path.iterdir())) == 2


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
        with replace_atomically(folder / "last.ckpt") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_what_killed_writes_have_left_is_removed(tmp_path):
    die_writing(tmp_path)
    (left,) = tmp_path.iterdir()
    (tmp_path / ".last.prev.ckpt.123.part").write_text("a link")
    others = [".last.ckpt.part", ".mine", ".thesis.docx.123.part"]
    for name in others:
        (tmp_path / name).write_text("x")
    removed = remove_unfinished(tmp_path, ("last.ckpt", "last.prev.ckpt", "none/a.csv"))
    assert {p.name for p in removed} == {left.name, ".last.prev.ckpt.123.part"}
    assert sorted(p.name for p in tmp_path.iterdir()) == others


def read(path):
    """What a file holds, None where it is refused."""
    try:
        return read_torch(path)
    except Exception:
        return None


def test_an_entry_that_is_marked_as_a_folder_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        entry = zipfile.ZipInfo("x/data/0")
        entry.external_attr = 0x10
        archive.writestr(entry, bytes(64))
    assert find_damage(tmp_path / "x.ckpt") == "x/data/0 is marked as a folder"


def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path):
    content, path = {"a": torch.arange(64.0), "b": "text"}, tmp_path / "x.ckpt"
    write_torch(path, content)
    whole = path.read_bytes()
    assert find_damage(path) is None
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 5)
    ]
    cut = [whole[:length] for length in range(0, len(whole), 41)]
    found = []
    for damaged in [*flipped, *cut]:
        path.write_bytes(damaged)
        found.append(read(path))
    assert found[len(flipped) :] == [None] * len(cut)
    # Nothing depends on some of the bits, as those of the time of day.
    as_it_was = [one for one in found if one is not None]
    assert len(as_it_was) < len(flipped) / 2
    assert all(
        one.keys() == content.keys() and torch.equal(one["a"], content["a"]) and one["b"] == "text"
        for one in as_it_was
    )


def pickled(name, *arguments):
    """A pickle that calls a global with texts or integers."""
    module, _, function = name.rpartition(".")
    body = b"".join(pickle.dumps(one, protocol=2)[2:-1] for one in arguments)
    return f"c{module}\n{function}\n(".encode() + body + b"tR"


def nested(opening, closing, depth=45):
    """A value of 2**depth uses of an empty tuple."""
    pairs = b"".join(b"h%ch%c" % (i, i) + b"\x86q" + bytes([i + 1]) for i in range(depth))
    return b")q\x00" + pairs + opening + b"h%c" % depth + closing


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        pickled("builtins.bytearray", 10**7),
        pickled("_codecs.encode", "a", "hex_codec"),
        pickled("torch.FloatStorage", 10**7),
        nested(b"}", b"Ns"),
        nested(b"ctorch\nSize\n", b"R"),
    ],
    ids=["bytearray", "codec", "storage", "nested_key", "nested_argument"],
)
def test_a_pickle_that_asks_for_much_is_refused_before_it_is_read(tmp_path, value, legacy):
    path = tmp_path / "x.ckpt"
    if legacy:
        path.write_bytes(b"\x80\x02" + value + b".")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + value + b".")
    with pytest.raises(
        (pickle.UnpicklingError, OverflowError), match="no checkpoint needs|more than"
    ):
        read_torch(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_checkpoints_hold_is_read(tmp_path, legacy):
    shared = [1, "a"]
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "weight": net.weight,
        "lists": [shared, shared],
    }
    content |= {
        "args": argparse.Namespace(lr=0.1),
        "size": net.weight.size(),
        "device": net.weight.device,
        "set": {1, 2},
    }
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = read_torch(tmp_path / "x.ckpt")
    assert str(found) == str(content)


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        *((f"{mark}1+1|x", f"'{mark}1+1|x") for mark in "=+-@\uff1d\uff0b\uff0d\uff20"),
        ("  =1", "'  =1"),
        *((number, number) for number in ("-0.5", "+1e-3", "-inf", "cat", "–", "a=1", "")),
        ("a\nb\t\x1b", r"a\x0ab\x09\x1b"),
        ("\n=1", r"\x0a=1"),
        (-0.5, "-0.5"),
    ],
)
def test_a_cell_of_a_table_is_no_formula_and_takes_one_line(cell, written):
    (row,) = csv.reader(io.StringIO(csv_text([{"=x": cell}])).readlines()[1:])
    assert row == ([written] if written else [""])
    assert csv_lines([["=x"]]) == "'=x\n"


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


def test_a_file_that_was_cut_off_is_damaged(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "a.ckpt")
    content = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=r"the file is damaged.*a\.ckpt"):
        read_torch(tmp_path / "a.ckpt")


def test_a_line_that_ends_within_a_character_does_not_count(tmp_path):
    (tmp_path / "a.csv").write_bytes("a,b\n1,2\n3,\u00e9".encode()[:-1])
    assert csv_rows(tmp_path / "a.csv") == [{"a": "1", "b": "2"}]
