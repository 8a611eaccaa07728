"""Paths that lead nowhere, to something else, or round in circles; and data files that are wrong."""

import gzip
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.campaign.checkpoints import Payload
from tests.campaign.files import FileCase, composed
from tests.conftest import encoded, write_cifar, write_parquet
from tests.data.files import write_cifar_batches, write_fashion_mnist, write_folder


def missing(folder):
    return folder / "missing"


def a_folder(folder):
    (folder / "folder").mkdir()
    return folder / "folder"


def an_empty_file(folder):
    (folder / "empty").touch()
    return folder / "empty"


def a_text(folder):
    (folder / "text").write_text("neither weights nor images\n")
    return folder / "text"


def below_a_file(folder):
    return a_text(folder) / "below"


def a_broken_link(folder):
    (folder / "broken").symlink_to(folder / "nowhere")
    return folder / "broken"


def a_circle(folder):
    (folder / "circle").symlink_to(folder / "circle")
    return folder / "circle"


def too_long(folder):
    return folder / ("x" * 300)


PLACES = (missing, a_folder, an_empty_file, a_text, below_a_file, a_broken_link, a_circle, too_long)
# A setting with what has to be set for it to be read.
SETTINGS = {
    "ckpt": ("train",),
    "model.weights": ("train",),
    "teacher.ckpt": ("train", "loss=kd"),
    "data.root": ("train", "data=imagefolder", "data.num_classes=2", "data.image_size=8", "data.patch_size=4"),
    "data.root ": ("train", "data=cifar10"),
    "data.root  ": ("train", "data=fashion_mnist"),
    "data.root   ": ("train", "data=hf_parquet", "data.num_classes=2", "data.image_size=8", "data.patch_size=4"),
    "ckpt ": ("eval",),
    "predict": ("eval", "ckpt={ckpt}"),
    "ckpt  ": ("ptq",),
    "teacher.ckpt ": ("ptq", "ckpt={ckpt}", "ptq=keep", "search=evolution", "search.targets=[attn.input]"),
    "ckpt   ": ("analyze", "analysis=cost"),
    "run": ("analyze",),
}


def path_cases(folder, quantized_ckpt):
    """Every setting with every place."""
    for number, (setting, (command, *more)) in enumerate(SETTINGS.items()):
        for place in PLACES:
            here = folder / f"{number}-{place.__name__}"
            here.mkdir()
            path, name = place(here), setting.strip()
            cfg = composed(command, here / "run", tuple(one.replace("{ckpt}", str(quantized_ckpt)) for one in more), **{name: path})
            yield FileCase(f"{name}: {place.__name__.replace('_', ' ')}", command, cfg, (f"{name}=", str(path)))


def parquet_without(column):
    def make(root):
        write_cifar(root)
        table = pq.read_table(root / "train.parquet").drop_columns([column])
        pq.write_table(table, root / "train.parquet")

    return make


def parquet_with(**columns):
    def make(root):
        write_cifar(root)
        table = pq.read_table(root / "train.parquet")
        for name, value in columns.items():
            table = table.set_column(table.column_names.index(name), name, pa.array(value(len(table))))
        pq.write_table(table, root / "train.parquet")

    return make


def a_cut_parquet(root):
    write_cifar(root)
    path = root / "test.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def no_test_parquet(root):
    write_cifar(root)
    (root / "test.parquet").unlink()


def an_image_that_is_none(root):
    write_cifar(root)
    write_parquet(root / "train.parquet", [encoded(np.zeros((32, 32, 3), np.uint8)), b"no image"] * 10, [0, 1] * 10)


def images_of_two_sizes(root):
    write_cifar(root)
    write_parquet(root / "train.parquet", [encoded(np.zeros((side, side, 3), np.uint8)) for side in (32, 30)] * 10, [0, 1] * 10)


def batches(change):
    def make(root):
        write_cifar_batches(root)
        change(root / "cifar-10-batches-py" / "data_batch_3")

    return make


def idx(name, change):
    def make(root):
        write_fashion_mnist(root)
        change(root / f"{name}-ubyte.gz")

    return make


def rewritten(change):
    """A gzipped file with other bytes in it."""
    return lambda path: path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def shortened(path):
    path.write_bytes(path.read_bytes()[:-30])


def folder(change):
    def make(root):
        write_folder(root, size=8)
        change(root)

    return make


def emptied(root):
    for path in (root / "train").rglob("*.*"):
        path.unlink()


def no_folders(root):
    for name in ("train", "val"):
        os.rename(root / name, root / f"{name}-old")


def a_class_more_in_val(root):
    (root / "val" / "cow").mkdir()
    Image.new("RGB", (8, 8)).save(root / "val" / "cow" / "0.png")


def files_without_classes(root):
    for path in list((root / "train").rglob("*.*")):
        path.rename(root / "train" / f"{path.parent.name}-{path.name}")
    for name in ("ant", "bee"):
        (root / "train" / name).rmdir()


FOLDER = ("data=imagefolder", "data.num_classes=2", "data.image_size=8", "data.patch_size=4", "data.num_workers=0")
DATA = {
    "cifar10: no images": ("data=cifar10", parquet_without("img")),
    "cifar10: no labels": ("data=cifar10", parquet_without("label")),
    "cifar10: a label of -1": ("data=cifar10", parquet_with(label=lambda n: [-1] + [0] * (n - 1))),
    "cifar10: a label of 10": ("data=cifar10", parquet_with(label=lambda n: [10, 10] + [0] * (n - 2))),
    "cifar10: a label of null": ("data=cifar10", parquet_with(label=lambda n: [None] + [0] * (n - 1))),
    "cifar10: labels that are words": ("data=cifar10", parquet_with(label=lambda n: ["cat"] * n)),
    "cifar10: labels that are fractions": ("data=cifar10", parquet_with(label=lambda n: [0.5] * n)),
    "cifar10: images that are numbers": ("data=cifar10", parquet_with(img=lambda n: [1] * n)),
    "cifar10: images that are null": ("data=cifar10", parquet_with(img=lambda n: pa.array([None] * n, pa.binary()))),
    "cifar10: cut": ("data=cifar10", a_cut_parquet),
    "cifar10: no test": ("data=cifar10", no_test_parquet),
    "cifar10: one image is none": ("data=cifar10", an_image_that_is_none),
    "cifar10: two sizes": ("data=cifar10", images_of_two_sizes),
    "cifar10: an image too few of a class": ("data=cifar10", parquet_with(label=lambda n: [3] + [0] * (n - 1))),
    "cifar10: batch with a payload": ("data=cifar10", batches(lambda p: p.write_bytes(pickle.dumps(Payload(p.parents[2] / "made"))))),
    "cifar10: batch cut": ("data=cifar10", batches(shortened)),
    "cifar10: batch gone": ("data=cifar10", batches(os.remove)),
    "cifar10: batch empty": ("data=cifar10", batches(lambda p: p.write_bytes(b""))),
    "cifar10: batch of something else": ("data=cifar10", batches(lambda p: p.write_bytes(pickle.dumps({b"data": 1})))),
    "cifar10: batch with a class too many": (
        "data=cifar10",
        batches(lambda p: p.write_bytes(pickle.dumps({b"data": [[1]], b"labels": [99]}))),
    ),
    "idx: cut": ("data=fashion_mnist", idx("train-images-idx3", shortened)),
    "idx: no gzip": ("data=fashion_mnist", idx("train-images-idx3", lambda p: p.write_bytes(b"text"))),
    "idx: empty": ("data=fashion_mnist", idx("t10k-labels-idx1", lambda p: p.write_bytes(b""))),
    "idx: wrong magic": ("data=fashion_mnist", idx("train-images-idx3", rewritten(lambda b: b"\0\0\x0d\3" + b[4:]))),
    "idx: a dimension more": ("data=fashion_mnist", idx("train-labels-idx1", rewritten(lambda b: b[:3] + b"\3" + b[4:]))),
    "idx: an image too many": ("data=fashion_mnist", idx("train-images-idx3", rewritten(lambda b: b[:7] + bytes([b[7] + 1]) + b[8:]))),
    "idx: a label too few": ("data=fashion_mnist", idx("train-labels-idx1", rewritten(lambda b: b[:7] + bytes([b[7] - 1]) + b[8:-1]))),
    "idx: a label of 200": ("data=fashion_mnist", idx("train-labels-idx1", rewritten(lambda b: b[:-2] + b"\xc8\xc8"))),
    "idx: gone": ("data=fashion_mnist", idx("t10k-images-idx3", os.remove)),
    "folder: no images": (FOLDER, folder(emptied)),
    "folder: no splits": (FOLDER, folder(no_folders)),
    "folder: a class more in val": (FOLDER, folder(a_class_more_in_val)),
    "folder: files without classes": (FOLDER, folder(files_without_classes)),
    "folder: three classes": ((*FOLDER, "data.num_classes=3"), folder(lambda root: None)),
    "folder: a class without an image": (FOLDER, folder(lambda root: [p.unlink() for p in (root / "train" / "bee").iterdir()])),
    "imagenet: no wnids": (("data=imagenet", "data.num_classes=2", "data.image_size=8", "data.patch_size=4"), folder(lambda root: None)),
}


def data_cases(folder):
    """Every wrong folder of data, read by a training run."""
    for number, (name, (choices, make)) in enumerate(DATA.items()):
        root = folder / f"data{number}"
        root.mkdir()
        make(root)
        overrides = (choices,) if isinstance(choices, str) else choices
        yield FileCase(name, "train", composed("train", folder / f"run{number}", overrides, **{"data.root": root}), ("data.", str(root)))
