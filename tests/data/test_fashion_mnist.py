"""Fashion-MNIST's files. Oracle: the arrays that were written."""

import numpy as np
import pytest

import qat
from qat.data import FashionMnist
from tests.conftest import results, train
from tests.data.files import write_fashion_mnist, write_idx

SETTINGS = {"image_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 4, "mean": [0.2860], "std": [0.3530]}
NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def rows(images, labels):
    return [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]


@pytest.mark.parametrize(("folder", "suffix"), [("", ".gz"), ("", ""), ("FashionMNIST/raw", "")])
def test_splits(tmp_path, folder, suffix):
    made = write_fashion_mnist(tmp_path / folder, suffix=suffix)
    data = FashionMnist(**SETTINGS, root=str(tmp_path))
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [36, 4, 10]
    assert sorted(data.split("val").labels.tolist()) == [0, 1, 2, 3]
    everything = [row for s in ("train", "val") for row in rows(data.split(s).images, data.split(s).labels)]
    assert sorted(everything) == sorted(rows(*made["train"]))
    assert rows(data.split("test").images, data.split("test").labels) == rows(*made["t10k"])


def test_the_held_out_images_do_not_depend_on_the_seed(tmp_path):
    write_fashion_mnist(tmp_path)
    first, second = (FashionMnist(**SETTINGS, root=str(tmp_path), seed=seed).split("val") for seed in (1, 2))
    assert np.array_equal(first.images, second.images)


def test_grey_can_be_read_as_colour(tmp_path):
    made = write_fashion_mnist(tmp_path)
    colour = FashionMnist(**{**SETTINGS, "in_chans": 3, "mean": [0.3] * 3, "std": [0.3] * 3}, root=str(tmp_path)).split("test")
    assert np.array_equal(colour.images, np.repeat(made["t10k"][0][..., None], 3, axis=3))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    write_fashion_mnist(tmp_path, suffix="")
    (tmp_path / name).unlink()
    with pytest.raises(qat.UsageError, match=rf"data\.root='{tmp_path}': holds no {name} or {name}\.gz"):
        FashionMnist(**SETTINGS, root=str(tmp_path)).train_dataloader()


@pytest.mark.parametrize("root", [None, "/no/such"])
def test_the_folder_has_to_be_there(root):
    message = (
        r"data\.root is not set: give the folder that holds train-images" if root is None else r"data\.root='/no/such': no such folder"
    )
    with pytest.raises(qat.UsageError, match=message):
        FashionMnist(**SETTINGS, root=root).train_dataloader()


DAMAGES = {
    "cut": (lambda content: content[:-5], "holds 31355 bytes of data, its header says 31360"),
    "longer": (lambda content: content + b"a", "holds 31361 bytes of data, its header says 31360"),
    "empty": (lambda content: b"", "is not an idx file"),
    "only a header": (lambda content: content[:8], "is not an idx file"),
    "of floats": (lambda content: b"\0\0\x0d\x03" + content[4:], "is not an idx file of unsigned bytes"),
    "labels": (lambda content: b"\0\0\x08\x01" + content[4:], r"is not an idx file of unsigned bytes with 3 dimension"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(tmp_path, damage):
    write_fashion_mnist(tmp_path, suffix="")
    path = tmp_path / NAMES[0]
    change, message = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(qat.UsageError, match=f"{path}: {message}"):
        FashionMnist(**SETTINGS, root=str(tmp_path)).train_dataloader()


@pytest.mark.parametrize("content", [b"no gzip", b"", None])
def test_a_damaged_archive_is_named(tmp_path, content):
    write_fashion_mnist(tmp_path)
    path = tmp_path / f"{NAMES[0]}.gz"
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(qat.UsageError, match=f"{path}: "):
        FashionMnist(**SETTINGS, root=str(tmp_path)).train_dataloader()


def test_as_many_labels_as_images_are_needed(tmp_path):
    write_fashion_mnist(tmp_path, suffix="")
    write_idx(tmp_path / NAMES[1], np.zeros(39))
    with pytest.raises(qat.UsageError, match="train has 40 images and 39 labels"):
        FashionMnist(**SETTINGS, root=str(tmp_path)).train_dataloader()


def test_a_net_trains(tmp_path):
    write_fashion_mnist(tmp_path / "data")
    small = ["data.num_workers=0", "data.batch_size=16", "data.num_classes=4"]
    run = train(tmp_path / "run", "data=fashion_mnist", f"data.root={tmp_path}/data", *small)
    assert results(run)["split"] == "test"
    assert results(run)["data"] == "fashionmnist"
