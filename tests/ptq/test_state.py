"""What a search leaves on the disk, damaged or without room for it. Oracle: what was written."""

import dataclasses
import errno
import os

import pytest
import torch

import qat
from qat.ptq.search_settings import SearchSettings
from qat.ptq.state import SearchFiles, SearchState


@pytest.fixture
def files(tmp_path):
    """With a state and a line of the log."""
    made = SearchFiles(tmp_path, SearchSettings(), "inputs")
    made.start_log(0)
    made.log([(0, "blocks.0", 0, 1.5, 1, "0.1", 20)])
    made.write(SearchState(1, 1.5, 2.0, {"blocks.0": torch.arange(512.0)}, lines=1))
    return made


def test_round_trip(files):
    state = files.read()
    assert (state.visits, state.fitness, state.lines) == (1, 1.5, 1)
    assert torch.equal(state.scales["blocks.0"], torch.arange(512.0))


def in_the_middle_of_scales(whole):
    return whole.index(torch.arange(200.0, 204.0).numpy().tobytes())


@pytest.mark.parametrize("length", [None, -1, 1000, 10, 0])
def test_a_damaged_state_is_one_line(length, files):
    whole = files.state_file.read_bytes()
    place = in_the_middle_of_scales(whole)
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    files.state_file.write_bytes(flipped if length is None else whole[:length])
    with pytest.raises(qat.UsageError, match=r"^resume: .*search.ckpt cannot be read; delete it to start anew$"):
        files.read()


@pytest.mark.parametrize(("name", "act"), [("search.ckpt", "write"), ("search.csv", "log")])
def test_without_room_the_error_names_the_file(name, act, files, tmp_path, monkeypatch):
    acts = {
        "write": lambda: files.write(dataclasses.replace(files.read(), visits=2)),
        "log": lambda: files.log([(1, "blocks.0")]),
    }

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device") as error:
            acts[act]()
    assert error.value.filename == str(tmp_path / name)
    assert files.read().visits == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["search.ckpt", "search.csv"]
