"""Atomic files. Oracle: what a reader finds afterwards."""

import os

import pytest
import torch

from qat.files import replacing, write_text, write_torch


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


def test_what_cannot_be_pickled_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    write_torch(path, {"a": 1})
    with pytest.raises((AttributeError, TypeError), match="pickle|local object"):
        write_torch(path, {"a": lambda: None})
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.pt"]


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_text(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


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


def test_without_links_the_previous_file_is_copied(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    path.write_text("one")
    monkeypatch.setattr(type(path), "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    with replacing(path, previous="last.prev.ckpt") as temporary:
        temporary.write_text("two")
    assert (path.read_text(), (tmp_path / "last.prev.ckpt").read_text()) == ("two", "one")
