"""Image sets in parquet files, as Hugging Face writes them. Oracle: the pixels that were written, as PNG."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qat.data import Cifar10, HfParquet, ImageArrays
from qat.data.parquet import ParquetImages, find_parquet
from tests.conftest import encoded, write_cifar, write_parquet
from tests.data.files import SETTINGS
from tests.errors import usage_error

PARTS = (
    ("train-00000-of-00002", 12),
    ("train-00001-of-00002", 8),
    ("validation-00000-of-00001", 6),
)


def pixels(n, size=None, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (size or 9 + i % 4, size or 12, 3), dtype=np.uint8) for i in range(n)
    ]


def write(root, parts=PARTS, size=None, **columns):
    made = {}
    for seed, (name, n) in enumerate(parts):
        made[name] = pixels(n, size, seed)
        write_parquet(
            root / "data" / f"{name}.parquet",
            [encoded(p) for p in made[name]],
            [i % 2 for i in range(n)],
            **columns,
        )
    return made


def same(source, expected):
    return len(source) == len(expected) and all(
        np.array_equal(source[i][0], image) for i, image in enumerate(expected)
    )


def data(root, **changes):
    return HfParquet(**{**SETTINGS, "root": str(root), **changes})


@pytest.mark.parametrize("size", [None, 10])
def test_splits(tmp_path, size):
    made = write(tmp_path, size=size)
    found = data(tmp_path)
    assert isinstance(found.split("train"), ParquetImages if size is None else ImageArrays)
    assert same(found.split("train"), made["train-00000-of-00002"] + made["train-00001-of-00002"])
    assert same(found.split("val"), made["validation-00000-of-00001"])
    assert [found.split("val")[i][1] for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert found.evaluation_split == "val"


def test_cifar(tmp_path):
    settings = {**SETTINGS, "num_classes": 4, "root": str(write_cifar(tmp_path))}
    found = Cifar10(**settings)
    assert [len(found.split(s)) for s in ("train", "val", "test")] == [36, 4, 10]
    assert sorted(found.split("val").labels.tolist()) == [0, 1, 2, 3]
    again = Cifar10(**settings, seed=2, memory_mb=0)
    assert same(again.split("val"), found.split("val").images)
    assert again.fingerprints() == found.fingerprints()
    images, _ = next(iter(found.val_dataloader()))
    assert images.shape == (4, 3, 8, 8)


def test_a_test_set_without_labels_is_left_out(tmp_path):
    write(tmp_path)
    write_parquet(tmp_path / "test.parquet", [encoded(p) for p in pixels(3)], [-1] * 3)
    assert data(tmp_path).evaluation_split == "val"


def test_columns_can_be_named(tmp_path):
    made = write(tmp_path, column="photo", label_column="kind")
    columns = {"image_column": "photo", "label_column": "kind"}
    assert same(data(tmp_path, **columns).split("val"), made["validation-00000-of-00001"])
    with usage_error(r"data\.image_column=None: .* photo, kind$"):
        data(tmp_path).split("val")


def test_cells_of_bytes(tmp_path):
    made = pixels(6)
    table = {
        "image": pa.array([encoded(p) for p in made], type=pa.binary()),
        "fine_label": pa.array([0, 1] * 3),
    }
    for name in ("train", "validation"):
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    assert same(data(tmp_path).split("val"), made)


@pytest.mark.parametrize("content", [b"no image", None])
def test_a_damaged_image_is_named(tmp_path, content):
    made = pixels(6, 10)
    for name, contents in (("train", made), ("validation", [*made[:2], content, *made[3:]])):
        cells = [one if one is content else encoded(one) for one in contents]
        write_parquet(tmp_path / f"{name}.parquet", cells, [0, 1] * 3)
    with usage_error(rf"^{tmp_path}: validation\.parquet .*: image 2 cannot be decoded \("):
        data(tmp_path).split("val")


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002", "train-00001-of-00002"),
        ("train_0", "train_1"),
        ("train-00000-of-00002-0123456789abcdef", "train-00001-of-00002-fedcba9876543210"),
    ],
)
def test_shards_come_in_order(tmp_path, names):
    for label, name in enumerate(names):
        write_parquet(tmp_path / "a" / f"{name}.parquet", [encoded(pixels(1)[0])], [label])
    assert [file.stem for file in find_parquet(tmp_path, "train")] == list(names)
    assert data(tmp_path, num_classes=2).encoded()["train"].labels.tolist() == [0, 1]


def test_two_sets_of_one_split_are_refused(tmp_path):
    for place in ("a", "b"):
        write_parquet(tmp_path / place / "train-00000-of-00001.parquet", [], [])
    line = rf"^data\.root='{tmp_path}': .* {tmp_path}/a, {tmp_path}/b$"
    with usage_error(line):
        data(tmp_path).train_dataloader()


def test_the_folder_has_to_be_there(tmp_path):
    os.mkfifo(tmp_path / "train.parquet")  # is never opened, for it would never end
    for root in (None, "/no/such", "", 5, str(tmp_path)):
        with usage_error(rf"^data\.root={root!r}: .*train\*\.parquet"):
            HfParquet(**SETTINGS, root=root).train_dataloader()


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "data lost"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, kind):
    path = tmp_path / "train.parquet"
    write_parquet(path, [encoded(p) for p in pixels(4)], [0, 1, 0, 1])
    content = path.read_bytes()
    changed = {
        "text": b"hello",
        "empty": b"",
        "cut": content[: len(content) // 2],
        "data lost": content[:4] + bytes(200) + content[204:],
    }
    path.write_bytes(changed[kind])
    with usage_error(rf"^{tmp_path}: train\.parquet .*: cannot be read as parquet"):
        data(tmp_path).train_dataloader()


@pytest.mark.parametrize(
    ("labels", "kind"),
    [([0, None], "int64 and 1 nulls"), (["a", "b"], "string and 0 nulls")],
    ids=["null", "text"],
)
def test_labels_that_are_no_class_ids_are_refused(tmp_path, labels, kind):
    pq.write_table(
        pa.table({"image": pa.array([b"", b""]), "label": pa.array(labels)}),
        tmp_path / "train.parquet",
    )
    with usage_error(rf"train\.parquet: .*{kind}"):
        data(tmp_path).train_dataloader()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_rows_is_refused(tmp_path, split):
    write(tmp_path, (("train", 20), (split, 0)))
    with usage_error(rf"{split}\.parquet: has no images$"):
        data(tmp_path).split("train")


def test_a_copy_of_train_is_named(tmp_path, caplog):
    write(tmp_path, (("train", 12),))
    folder = tmp_path / "data"
    (folder / "validation.parquet").symlink_to(folder / "train.parquet")
    (folder / "test.parquet").write_bytes((folder / "train.parquet").read_bytes())
    data(tmp_path).split("train")
    pairs = [("train", "val"), ("train", "test"), ("val", "test")]
    assert caplog.messages == [
        f"data: {a} and {b} contain the same images; accuracy on {b} does not show how the model does on new images"
        for a, b in pairs
    ]
