"""Checkpoint files appear whole or not at all. Oracle: the files left after a write that dies."""

import pathlib
import pickle

import pytest
import torch

from qat.lit.checkpoint_io import AtomicCheckpointIO


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.arange(3)}, "global_step": 7}, path)
    back = AtomicCheckpointIO().load_checkpoint(path)
    assert back["global_step"] == 7
    assert back["state_dict"]["w"].tolist() == [0, 1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"n": 1}, path)

    def dies(content, target, *args, **kwargs):
        pathlib.Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"n": 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("weights_only", [None, False])
def test_code_inside_a_file_is_refused_whatever_the_caller_says(tmp_path, weights_only):
    torch.save({"x": pathlib.PurePosixPath("a")}, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
