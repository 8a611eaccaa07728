"""Checkpoint files are complete or absent. Oracle: the files after an interrupted write."""

import pathlib
import pickle

import pytest
import torch

from qat.lit.strategies import AtomicCheckpointIO
from tests.errors import usage_error


@pytest.mark.parametrize("weights_only", [None, False])
def test_code_inside_a_file_is_refused_whatever_the_caller_says(tmp_path, weights_only):
    torch.save({"x": pathlib.PurePosixPath("a")}, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        RuntimeError("[enforce fail at inline_container.cc] . unexpected pos"),
    ],
)
def test_a_full_disk_is_one_line_and_costs_nothing(error, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)

    def fail(_, file):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with usage_error(r"last\.ckpt cannot be written \(.*intact"):
        AtomicCheckpointIO().save_checkpoint({"a": 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
