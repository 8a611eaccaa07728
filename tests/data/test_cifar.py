"""CIFAR-10's files: a tenth of the training images is held out. Oracle: the files written here."""

import numpy as np
import pytest

import qat
from qat.data import Cifar10
from tests.conftest import write_cifar
from tests.data.files import read_parquet

SETTINGS = {"image_size": 32, "patch_size": 4, "in_chans": 3, "num_classes": 4, "mean": [0.5] * 3, "std": [0.25] * 3}


def rows(arrays):
    return [image.tobytes() for image in arrays.images]


def test_splits(tmp_path):
    root = str(write_cifar(tmp_path))
    data = Cifar10(**SETTINGS, root=root)
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [36, 4, 10]
    assert sorted(data.split("val").labels.tolist()) == [0, 1, 2, 3]
    assert data.evaluation_split == "test"
    assert rows(data.split("test")) == rows(read_parquet([tmp_path / "test.parquet"], chans=3))
    assert sorted(rows(data.split("train")) + rows(data.split("val"))) == sorted(rows(read_parquet([tmp_path / "train.parquet"], chans=3)))


def test_the_held_out_images_do_not_depend_on_the_seed(tmp_path):
    root = str(write_cifar(tmp_path))
    assert rows(Cifar10(**SETTINGS, root=root, seed=1).split("val")) == rows(Cifar10(**SETTINGS, root=root, seed=2).split("val"))


def test_other_image_sizes_are_resized(tmp_path):
    data = Cifar10(**{**SETTINGS, "image_size": 16}, root=str(write_cifar(tmp_path)))
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert data.split("train").images.dtype == np.uint8


def test_without_a_folder_the_setting_is_named():
    with pytest.raises(qat.UsageError, match=r"data\.root is not set"):
        Cifar10(**SETTINGS).train_dataloader()


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    with pytest.raises(qat.UsageError, match=r"data\.num_classes=3: the train split has a label 3"):
        Cifar10(**{**SETTINGS, "num_classes": 3}, root=str(write_cifar(tmp_path))).train_dataloader()
