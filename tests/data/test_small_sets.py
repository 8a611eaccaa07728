"""CIFAR-10 and Fashion-MNIST. Oracle: the arrays that were written."""

import numpy as np
import pytest
from torchvision import datasets

from qat.data import Cifar10, FashionMnist
from qat.data.splits import stratified_split
from tests.conftest import write_cifar
from tests.data.files import GREY, SETTINGS, rows, write_cifar_batches, write_fashion_mnist
from tests.errors import usage_error

COLOURS = {**SETTINGS, "num_classes": 4, "image_size": 32}


def check_splits(data, train, test):
    """A tenth of each class is held out; nothing is lost."""
    splits = {name: data.split(name) for name in ("train", "val", "test")}
    assert [len(one) for one in splits.values()] == [36, 4, len(test[1])]
    assert sorted(splits["val"].labels.tolist()) == [0, 1, 2, 3]
    everything = [
        row for name in ("train", "val") for row in rows(splits[name].images, splits[name].labels)
    ]
    assert sorted(everything) == rows(*train)
    assert np.array_equal(splits["test"].images, test[0])
    assert splits["test"].labels.tolist() == list(test[1])


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Batches whose sums torchvision takes for those of the published files."""
    made, sums = write_cifar_batches(tmp_path)
    monkeypatch.setattr(
        datasets.CIFAR10,
        "train_list",
        [[name, sums[name]] for name in made if name != "test_batch"],
    )
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
    )
    return made


def test_batches_of_cifar(tmp_path, cifar):
    batches = [cifar[name] for name in cifar if name != "test_batch"]
    train = (
        np.concatenate([images for images, _ in batches]),
        [label for _, labels in batches for label in labels],
    )
    check_splits(Cifar10(**COLOURS, root=str(tmp_path)), train, cifar["test_batch"])
    assert Cifar10(**COLOURS | GREY, root=str(tmp_path)).split("test").images.shape == (
        8,
        32,
        32,
        1,
    )
    write_cifar(tmp_path)
    assert len(Cifar10(**COLOURS, root=str(tmp_path)).split("test")) == 10, (
        "parquet files come first"
    )


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", None])
def test_nothing_is_unpickled_unless_the_sums_are_the_published_ones(
    tmp_path, cifar, monkeypatch, file
):
    if file is None:
        monkeypatch.undo()  # the sums of these files are not the published ones
    else:
        (tmp_path / "cifar-10-batches-py" / file).write_bytes(b"anything")
    monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("unpickled"))
    line = rf"^data\.root='{tmp_path}': .*cifar-10-batches-py \(Dataset not found or corrupted"
    with usage_error(line):
        Cifar10(**COLOURS, root=str(tmp_path)).train_dataloader()


def test_fashion_mnist(tmp_path):
    made = write_fashion_mnist(tmp_path)
    grey = {**COLOURS, **GREY, "root": str(tmp_path)}
    check_splits(
        FashionMnist(**grey), *((images[..., None], labels) for images, labels in made.values())
    )
    assert np.array_equal(
        FashionMnist(**grey, seed=2).split("val").images, FashionMnist(**grey).split("val").images
    )
    colour = FashionMnist(**COLOURS, root=str(tmp_path)).split("test")
    assert np.array_equal(colour.images, np.repeat(made["t10k"][0][..., None], 3, axis=3))


@pytest.mark.parametrize(
    "content", [None, b"", b"no idx file", b"\0\0\x08\x03\0\0\0\x28\0\0\0\x1c\0\0\0\x1c"]
)
def test_missing_and_damaged_files_are_one_line(tmp_path, content):
    write_fashion_mnist(tmp_path)
    path = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    path.unlink() if content is None else path.write_bytes(content)
    line = rf"^data\.root='{tmp_path}': [^\n]*FashionMNIST/raw/[^\n]* \([^\n]*\)$"
    with usage_error(line):
        FashionMnist(**{**COLOURS, **GREY}, root=str(tmp_path)).train_dataloader()


@pytest.mark.parametrize("dataset", [Cifar10, FashionMnist])
def test_the_folder_has_to_be_there(dataset):
    for root in (None, "/no/such"):
        with usage_error(rf"^data\.root={root!r}: must be the folder "):
            dataset(**COLOURS, root=root).train_dataloader()


def test_the_held_out_images_are_the_same_for_ever():
    # The first of ten thousand labels in turns, as they were when results were published.
    kept, out = stratified_split(np.arange(10000) % 10, 0.1)
    assert out[:12].tolist() == [3, 14, 23, 31, 54, 62, 65, 72, 87, 90, 96, 101]
    assert sorted([*kept, *out]) == [*range(10000)]
