"""Datasets by their names in timm. Oracles: timm's own `create_dataset` on the same files, and a folder of the same images."""

import os
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data
import torch

from qat.data import ImageFolder, Timm
from tests.conftest import encoded
from tests.data.files import GREY, write_fashion_mnist, write_folder, write_image
from tests.data.files import SETTINGS as SMALL
from tests.errors import usage_error

SETTINGS = {**SMALL, "crop_pct": 1.0, "interpolation": "bicubic"}
SPLITS = (("train", 20), ("validation", 4))


def data(folder, **changes):
    return Timm(**{**SETTINGS, "root": str(folder), **changes})


def tar(root):
    """All images of a folder, in `photos.tar`."""
    folder = write_folder(root / "folder", (("train", 20),))
    with tarfile.open(root / "photos.tar", "w") as file:
        file.add(folder / "train", "photos")
    return root / "photos.tar"


@pytest.mark.parametrize("size", [None, 10])
def test_a_folder_is_timms(tmp_path, size):
    root = write_folder(tmp_path, SPLITS, size=size)
    found = data(root)
    for split, name in (("train", "train"), ("val", "validation")):
        source, expected = found.split(split), timm.data.create_dataset("", str(root), name)
        assert len(source) == len(expected)
        for i, (image, label) in enumerate(expected):
            assert np.array_equal(source[i][0], np.asarray(image))
            assert source[i][1] == label
    assert (found.named_classes(), found.evaluation_split) == (["ant", "bee"], "val")
    assert Timm(**SETTINGS).named_classes() is None


def test_a_folder_may_be_a_number_or_a_path(tmp_path, monkeypatch):
    write_folder(tmp_path / "2024", SPLITS)
    monkeypatch.chdir(tmp_path)
    for root in (2024, tmp_path / "2024"):  # as the command line reads it
        assert (
            len(Timm(**SETTINGS, root=root).split("train"))
            == len(ImageFolder(**SETTINGS, root=root).split("train"))
            == 40
        )


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_of_a_folder_that_has_no_end_is_named(tmp_path, kind):
    root = write_folder(tmp_path, SPLITS, size=10)
    path = root / "train" / "ant" / "x.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with usage_error(r"image \d+ cannot be decoded \(No such file, or larger than"):
        data(root).split("train")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file_is_timms_and_goes_on_in_the_middle_of_an_epoch(tmp_path, workers):
    path = tar(tmp_path)
    settings = {"val_split": None, "augment": "timm", "batch_size": 4}
    found = data(path, **settings, num_workers=workers)
    expected = {
        (np.asarray(image).tobytes(), label)
        for image, label in timm.data.create_dataset("", str(path))
    }
    assert [len(found.split(split)) for split in ("train", "val")] == [36, 4]
    assert {
        (image.tobytes(), label)
        for split in ("train", "val")
        for image, label in map(found.split(split).__getitem__, range(4))
    } < expected
    whole = [images for images, _ in data(path, **settings).train_dataloader()]
    loader = found.train_dataloader()
    loader.load_state_dict({"batches": 3})
    assert torch.equal(torch.cat([images for images, _ in loader]), torch.cat(whole[3:]))


def test_torchvisions_datasets(tmp_path):
    made = write_fashion_mnist(tmp_path)
    found = data(
        tmp_path,
        **GREY,
        name="torch/fashion_mnist",
        num_classes=10,
        val_split=None,
        test_split="test",
    )
    assert [len(found.split(split)) for split in ("train", "val", "test")] == [36, 4, 10]
    assert np.array_equal(found.split("test").images[..., 0], made["t10k"][0])
    assert found.split("test").labels.tolist() == made["t10k"][1].tolist()
    assert found.named_classes()[9] == "Ankle boot"


def test_a_dataset_of_the_hub(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)

    class Rows(list):
        """What timm uses of a `datasets.Dataset`."""

        info = SimpleNamespace(
            splits=None,
            features={"kind": SimpleNamespace(names=["ant", "bee"], str2int=["ant", "bee"].index)},
        )

        def cast_column(self, *_):
            return self

        def remove_columns(self, _):
            return [{"kind": row["kind"]} for row in self]

    rows = Rows(
        {"photo": {"bytes": encoded(image)}, "kind": i % 2} for i, image in enumerate(images)
    )
    asked = []
    fake = SimpleNamespace(
        load_dataset=lambda name, **how: asked.append((name, how["split"])) or rows,
        Image=lambda **_: None,
        __spec__=None,
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    monkeypatch.setattr(
        "timm.data.readers._hfds.get_class_labels", lambda *_: {"ant": 0, "bee": 1}, raising=False
    )
    settings = {
        **SETTINGS,
        "name": "hfds/user/photos",
        "image_column": "photo",
        "label_column": "kind",
        "val_split": "train[:10%]",
    }
    with usage_error(r"^data\.val_split='train\[:10%\]': overlaps with data.train_split='train';"):
        Timm(**settings).split("train")
    asked.clear()
    found = Timm(**settings, train_split="train[10%:]")
    assert np.array_equal(found.split("train").images, images)
    assert found.split("val").labels.tolist() == [0, 1] * 20
    assert asked == [("user/photos", "train[10%:]"), ("user/photos", "train[:10%]")]


def test_fingerprints_tell_files_and_labels_apart_wherever_they_are(tmp_path):
    first, second = (
        data(write_folder(tmp_path / name, SPLITS)).fingerprints() for name in ("a", "b")
    )
    assert first == second
    assert first["train"] != first["val"]
    write_image(tmp_path / "b" / "train" / "ant" / "more.png", 9, 9)
    changed = data(tmp_path / "b").fingerprints()
    assert (changed["train"] == first["train"], changed["val"] == first["val"]) == (False, True)


@pytest.mark.parametrize("name", ["", "torch/image_folder"])
def test_a_split_has_the_classes_of_train_with_their_ids(tmp_path, name):
    write_folder(tmp_path, (("train", 20),))
    write_folder(tmp_path, (("validation", 4),), classes=("bee",))
    assert data(tmp_path, name=name).split("val").labels.tolist() == [1] * 4
    write_folder(tmp_path, (("validation", 4),), classes=("Ant",))
    with usage_error(
        r"^data\.val_split='validation': class 'Ant' ",
    ):
        data(tmp_path, name=name).split("val")


@pytest.mark.parametrize(
    "case", ["no such folder in the split's name", "one split twice", "a tar file", "val is test"]
)
def test_a_split_that_is_another_one_is_refused(tmp_path, case):
    splits = SPLITS if case == "val is test" else (("train", 20),)
    root = tar(tmp_path) if case == "a tar file" else write_folder(tmp_path / "data", splits)
    changes = {
        "one split twice": {"val_split": "train"},
        "val is test": {"test_split": "validation"},
    }.get(case, {})
    one, other = ("test", "val") if case == "val is test" else ("val", "train")
    with usage_error(
        rf"^data\.{one}_split='\w+': shares files with the {other} split; must have other files",
    ):
        data(root, **changes).train_dataloader()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"name": "torch/no_such"},
            r"data\.name='torch/no_such': .* 'train' .*: AssertionError: Unknown",
        ),
        ({"name": None}, r"data\.name=None: "),
        ({"download": "no"}, r"data\.download='no': must be true or false$"),
        (
            {"train_split": None, "val_split": None},
            r"data\.train_split, data\.val_split and data\.test_split are null: ",
        ),
        ({"root": None}, r"data\.root=None: must be .*tar file$"),
    ],
    ids=["unknown", "unnamed", "download", "splits", "root"],
)
def test_what_cannot_be_read_is_one_line(tmp_path, changes, line):
    write_folder(tmp_path, (("train", 20),))
    with usage_error(rf"^{line}"):
        data(tmp_path, **changes).split("train")
