"""Datasets by their name in timm. Oracles: timm's own `create_dataset` on the same files, and what a folder of the same images gives."""

import os
import pickle
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import IterableDataset

import qat
from qat.data import ImageFolder, Timm
from tests.conftest import compose, evaluate, results, train
from tests.data.files import write_fashion_mnist, write_folder, write_image

SETTINGS = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 2, "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
SETTINGS |= {"interpolation": "bicubic"}
SPLITS = (("train", 20), ("validation", 4))


def data(root, **changes):
    return Timm(**{**SETTINGS, "root": str(root), **changes})


def same(source, expected):
    return len(source) == len(expected) and all(
        np.array_equal(source[i][0], np.asarray(image)) and source[i][1] == label for i, (image, label) in enumerate(expected)
    )


def tar(root, size=None):
    """All images of a folder, in `photos.tar`."""
    folder = write_folder(root / "folder", (("train", 20),), size=size)
    with tarfile.open(root / "photos.tar", "w") as file:
        file.add(folder / "train", "photos")
    return root / "photos.tar"


@pytest.mark.parametrize("size", [None, 10])
def test_a_folder_is_timms(tmp_path, size):
    root = write_folder(tmp_path, SPLITS, size=size)
    found = data(root)
    for split, name in (("train", "train"), ("val", "validation")):
        assert same(found.split(split), timm.data.create_dataset("", str(root), name))
    assert (found.named_classes(), found.evaluation_split) == (["ant", "bee"], "val")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file_is_timms_and_a_tenth_is_held_out(tmp_path, workers):
    path = tar(tmp_path)
    found = data(path, val_split=None, augment="light", batch_size=4, num_workers=workers)
    assert [len(found.split(split)) for split in ("train", "val")] == [36, 4]
    assert found.calibration_batches()[0].shape == (4, 3, 8, 8)
    expected = {(np.asarray(image).tobytes(), label) for image, label in timm.data.create_dataset("", str(path))}
    sources = [found.split(split) for split in ("train", "val")]
    assert {(source[i][0].tobytes(), source[i][1]) for source in sources for i in range(len(source))} == expected
    batches = torch.cat([images for images, _ in found.train_dataloader()])
    alone = data(path, val_split=None, augment="light", batch_size=4)
    assert torch.equal(batches, torch.cat([images for images, _ in alone.train_dataloader()]))


def test_torchvisions_datasets(tmp_path):
    made = write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", suffix="")
    grey = {"in_chans": 1, "mean": [0.5], "std": [0.5], "num_classes": 10}
    found = data(tmp_path, **grey, name="torch/fashion_mnist", val_split=None, test_split="test")
    assert [len(found.split(split)) for split in ("train", "val", "test")] == [36, 4, 10]
    assert np.array_equal(found.split("test").images[..., 0], made["t10k"][0])
    assert found.split("test").labels.tolist() == made["t10k"][1].tolist()
    assert found.named_classes()[9] == "Ankle boot"


def test_batches_are_those_of_an_image_folder(tmp_path):
    root = str(write_folder(tmp_path, SPLITS))
    settings = {**SETTINGS, "root": root, "augment": "timm", "batch_size": 8, "seed": 3}
    for ours, theirs in zip(Timm(**settings).train_dataloader(), ImageFolder(**settings).train_dataloader(), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_an_epoch_goes_on_in_its_middle(tmp_path):
    path = tar(tmp_path)
    loader, again = (data(path, val_split=None, augment="timm", batch_size=4).train_dataloader() for _ in range(2))
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    again.load_state_dict(loader.state_dict())
    rest = list(again)
    assert len(rest) == 6
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(rest, batches, strict=True))


def test_fingerprints_tell_files_and_labels_apart_wherever_they_are(tmp_path):
    first, second = (data(write_folder(tmp_path / name, SPLITS)).fingerprints() for name in ("a", "b"))
    assert first == second
    assert first["train"] != first["val"]
    write_image(tmp_path / "b" / "train" / "ant" / "more.png", 9, 9)
    changed = data(tmp_path / "b").fingerprints()
    assert (changed["train"] == first["train"], changed["val"] == first["val"]) == (False, True)


class InOrder(IterableDataset):
    """As timm's for webdataset shards: no length, no index; what cannot be decoded is dropped, a mode is converted to with Pillow."""

    def __init__(self, count, damaged=0, first=None, mode=""):
        self.count, self.first, self.mode = count, first, mode
        self.reader = SimpleNamespace(class_to_idx={}, dist_rank=1, dist_num_replicas=2, num_samples=count + damaged)

    def __iter__(self):
        for i in range(self.reader.dist_rank, self.count, self.reader.dist_num_replicas):
            pixels = np.full((9, 10 + i % 3, 3), i, dtype=np.uint8) if i or self.first is None else self.first
            image = Image.fromarray(pixels)
            yield image.convert(self.mode) if self.mode else image, i % 2


@pytest.fixture
def shards(monkeypatch):
    made = {"train": 20, "validation": 6}
    monkeypatch.setattr(timm.data, "create_dataset", lambda name, split, **_: InOrder(made[split]))
    monkeypatch.setitem(sys.modules, "webdataset", SimpleNamespace(__spec__=object()))


def test_a_reader_without_an_index_is_read_once_and_whole(tmp_path, shards):
    found = data(tmp_path, name="wds/photos", batch_size=4)
    assert [[int(source[i][0].mean()) for i in range(len(source))] for source in map(found.split, found.splits)] == [
        [*range(20)],
        [*range(6)],
    ]
    first, second = ([labels.tolist() for _, labels in data(tmp_path, name="wds/x", batch_size=4).train_dataloader()] for _ in range(2))
    assert first == second
    assert len(first) == 5


@pytest.fixture
def odd_shards(shards, monkeypatch):
    """Shards that hold some images which cannot be decoded, or one of another kind in front."""

    def make(**odd):
        monkeypatch.setattr(timm.data, "create_dataset", lambda name, split, input_img_mode, **_: InOrder(20, mode=input_img_mode, **odd))

    return make


@pytest.mark.parametrize(("split", "name", "other"), [("train", "train", "val_split"), ("val", "validation", "train_split")])
def test_images_that_timm_drops_are_counted(tmp_path, odd_shards, split, name, other):
    odd_shards(damaged=3)
    line = rf"^data\.name='wds/photos': timm reads 20 of 23 images of '{name}', others are damaged or have no label; data\.on_error=skip"
    with pytest.raises(qat.UsageError, match=line):
        data(tmp_path, name="wds/photos", **{other: None}).split(split)
    found = data(tmp_path, name="wds/photos", on_error="skip", **{other: None})
    assert sum(len(found.split(one)) for one in found.splits) == 20
    assert found.left_out() == {split: 3}


def test_an_image_of_32_bits_is_named_or_left_out(tmp_path, odd_shards, caplog):
    odd_shards(damaged=3, first=np.zeros((9, 9), dtype=np.float32))
    settings = {"name": "wds/photos", "on_error": "skip"}
    found = data(tmp_path, **settings, val_split=None)
    found.split("train")
    assert found.left_out() == {"train": 4}
    assert "'train': image 0 cannot be decoded (its pixels have 32 bits" in caplog.text
    odd_shards(first=np.zeros((9, 9), dtype=np.float32))
    with pytest.raises(qat.UsageError, match=r"data\.name='wds/photos', 'train': image 0 cannot be decoded \(its pixels have 32 bits"):
        data(tmp_path, name="wds/photos", val_split=None).split("train")


def test_grey_of_16_bits_is_scaled(tmp_path, odd_shards):
    odd_shards(first=np.full((9, 9), 100 * 257, dtype=np.uint16))
    assert np.array_equal(data(tmp_path, name="wds/photos", val_split=None).split("train")[0][0], np.full((9, 9, 3), 100))


@pytest.mark.parametrize(("name", "mode"), [("wds/x", ""), ("hfids/x", ""), ("tfds/x", "RGB")])
def test_timm_converts_no_mode_but_where_it_needs_one(tmp_path, monkeypatch, name, mode):
    asked = []
    monkeypatch.setattr(timm.data, "create_dataset", lambda *_, input_img_mode, **__: asked.append(input_img_mode) or InOrder(20))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    data(tmp_path, name=name, val_split=None).split("train")
    assert asked == [mode]


def test_a_split_without_images_is_named(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(timm.data, "create_dataset", lambda name, split, **_: InOrder(0))
    with pytest.raises(qat.UsageError, match=r"^data\.name='wds/photos': must hold images; 'train' has none$"):
        data(tmp_path, name="wds/photos").train_dataloader()


def test_labels_that_are_no_class_ids_are_refused(tmp_path, monkeypatch):
    class OfSeveral(InOrder):
        def __iter__(self):
            yield from ((image, [0.5, 0.5]) for image, _ in super().__iter__())

    monkeypatch.setattr(timm.data, "create_dataset", lambda name, split, **_: OfSeveral(3))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(qat.UsageError, match=r"^data\.label_column='kind': must hold one class id for each image of 'train'$"):
        data(tmp_path, name="wds/photos", label_column="kind").train_dataloader()


def test_one_that_does_not_fit_is_refused(tmp_path, shards):
    with pytest.raises(
        qat.UsageError, match=r"^data\.memory_mb=0\.001: must hold all images of 'train': wds/ has no index; hfds/ has one$"
    ):
        data(tmp_path, name="wds/photos", memory_mb=0.001).train_dataloader()


@pytest.mark.parametrize(
    ("name", "package"),
    [("hfds/a/b", "datasets"), ("hfids/a", "datasets"), ("wds/a", "webdataset"), ("tfds/a", "tensorflow_datasets"), ("HFDS/a", "datasets")],
)
def test_a_package_that_is_not_there_is_one_line(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(qat.UsageError, match=rf"^data\.name='{name}': must be read with the package {package}, which is not installed$"):
        data(tmp_path, name=name).train_dataloader()


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(timm.data, "create_dataset", unreachable)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(qat.UsageError) as caught:
        Timm(**SETTINGS, name="hfds/x").train_dataloader()
    line = "data.name='hfds/x': must be a dataset that timm can read; of 'train' it says: ConnectionError: no route"
    assert str(caught.value) == line


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_strangers_pickles_are_not_read(tmp_path, dataset):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    names = {"cifar10": [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)] + ["cifar-10-batches-py/test_batch"]}
    for name in names.get(dataset, ["cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(
        qat.UsageError, match=rf"^data\.name='torch/{dataset}': must be a dataset that timm can read; .* not found or corrupted"
    ):
        data(tmp_path, name=f"torch/{dataset}").train_dataloader()
    assert not (tmp_path / "owned").exists()


BAD = [
    ({"name": "other/x"}, r"data\.name='other/x': must be empty \(a folder or a tar file\), or one of torch/NAME, hfds/NAME"),
    ({"name": 3}, r"data\.name=3: must be empty"),
    ({"name": "torch/none"}, r"data\.name='torch/none': must be a dataset that timm can read; .*Unknown torchvision dataset none"),
    ({"root": None}, r"data\.root is not set: give the folder that holds the dataset that timm reads"),
    ({"root": "/no/such.tar"}, r"data\.root='/no/such\.tar': no such folder"),
    ({"train_split": ""}, r"data\.train_split='': must be a text"),
    ({"download": 1}, r"data\.download=1: must be true or false"),
    ({"train_split": None, "val_split": None}, r"data\.train_split=None: must be a split"),
    ({"num_classes": None}, r"data\.num_classes is not set: data\.root='.*' has 2 classes; set data\.num_classes=2"),
    ({"val_split": "train"}, r"data\.val_split='train': must be other images than data\.train_split='train'"),
    ({"val_split": "other"}, r"data\.val_split='other': must be other images than data\.train_split='train'"),
    ({"name": "torch/folder", "val_split": "train"}, r"data\.val_split='train': must be other images than data\.train_split='train'"),
]


@pytest.mark.parametrize(("changes", "line"), BAD)
def test_what_cannot_work_is_one_line(tmp_path, changes, line):
    root = write_folder(tmp_path, SPLITS)
    with pytest.raises(qat.UsageError, match=f"^{line}") as caught:
        Timm(**{**SETTINGS, "root": str(root), **changes}).train_dataloader()
    assert "\n" not in str(caught.value)


@pytest.fixture
def sliced(monkeypatch):
    """A stand-in for timm's hfds reader of 600 training and 100 test images, which takes the slices of `datasets`."""
    splits = {"train": SimpleNamespace(num_examples=600), "test": SimpleNamespace(num_examples=100)}
    reader = SimpleNamespace(dataset=SimpleNamespace(info=SimpleNamespace(splits=splits)), iter_targets=lambda: [0, 1])
    monkeypatch.setattr(timm.data, "create_dataset", lambda *_, **__: SimpleNamespace(reader=reader))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train", "train[:10%]"),
        ("train", "train[500:]"),
        ("train+test", "test"),
        ("all", "test[-1:]"),
        ("train[:90%]", "train[:100]"),
        ("train[:90%]", "train[539:]"),
        ("train[:-100]", "train[-101:]"),
        ("train[10:20] + test[:5]", "train[19:30]"),
        ("train[:50%](pct1_dropremainder)", "train[:50%](pct1_dropremainder)"),
    ],
)
def test_slices_that_share_images_are_refused(sliced, one, other):
    for train_split, val_split in ((one, other), (other, one)):
        with pytest.raises(qat.UsageError) as caught:
            Timm(**SETTINGS, name="hfds/x", train_split=train_split, val_split=val_split).named_classes()
        line = f"data.val_split={val_split!r}: must be other images than data.train_split={train_split!r}; null for no such split"
        assert str(caught.value) == line


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train", "test"),
        ("train[:90%]", "train[90%:]"),
        ("train[:90%]", "train[540:]"),
        ("train[:-100]", "train[-100:]"),
        ("train[100:200]+test[:50]", "train[:100]+test[50:]+train[200:]"),
    ],
)
def test_slices_of_other_images_are_two_splits(sliced, one, other):
    for train_split, val_split in ((one, other), (other, one)):
        Timm(**SETTINGS, name="hfds/x", train_split=train_split, val_split=val_split).named_classes()


def test_class_ids_are_those_of_train(tmp_path):
    root = write_folder(tmp_path, (("train", 4),), classes=("ant", "bee"))
    write_folder(tmp_path, (("validation", 3),), classes=("bee",))
    assert data(root).split("val").labels.tolist() == [1, 1, 1]
    write_image(tmp_path / "validation" / "cat" / "a.png", 9, 9)
    with pytest.raises(qat.UsageError, match=r"^data\.val_split='validation': must have the classes of 'train', which has no 'cat'$"):
        data(root).train_dataloader()


def test_a_net_trains_resumes_and_is_evaluated_from_its_file(tmp_path, refused):
    root = write_folder(tmp_path / "data", SPLITS)
    small = ["data.image_size=16", "data.patch_size=8", "data.num_workers=0", "data.batch_size=8"]
    line = refused("train", compose("train", "data=timm", f"data.root={root}", *small, f"run_dir={tmp_path}/refused"))
    assert line.endswith("has 2 classes; set data.num_classes=2")
    run = train(tmp_path / "run", "data=timm", f"data.root={root}", *small, "data.num_classes=2")
    assert results(run)["data"] == "timm"
    assert evaluate(tmp_path / "eval", f"ckpt={run}/checkpoints/best.ckpt")["top1"] == results(run)["top1"]
