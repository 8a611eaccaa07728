"""Image sets in parquet files. Oracle: the pixels that were written, as PNG."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import qat
from qat.data import HfParquet, ImageArrays
from qat.data.encoded import LazyImages
from tests.conftest import compose, encoded, evaluate, results, train, write_parquet

SETTINGS = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 2, "mean": [0.5] * 3, "std": [0.25] * 3}


def pixels(n, size=None, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (size or 9 + i % 4, size or 12, 3), dtype=np.uint8) for i in range(n)]


def write(root, parts=(("train-00000-of-00002", 12), ("train-00001-of-00002", 8), ("validation-00000-of-00001", 6)), size=None, **columns):
    made = {}
    for seed, (name, n) in enumerate(parts):
        made[name] = pixels(n, size, seed)
        write_parquet(root / "data" / f"{name}.parquet", [encoded(p) for p in made[name]], [i % 2 for i in range(n)], **columns)
    return made


def same(source, expected):
    return len(source) == len(expected) and all(np.array_equal(source[i][0], image) for i, image in enumerate(expected))


@pytest.mark.parametrize("size", [None, 10])
def test_splits(tmp_path, size):
    made = write(tmp_path, size=size)
    data = HfParquet(**SETTINGS, root=str(tmp_path))
    assert isinstance(data.split("train"), LazyImages if size is None else ImageArrays)
    assert same(data.split("train"), made["train-00000-of-00002"] + made["train-00001-of-00002"])
    assert same(data.split("val"), made["validation-00000-of-00001"])
    assert [data.split("val")[i][1] for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert data.evaluation_split == "val"


@pytest.mark.parametrize("size", [None, 10])
def test_without_validation_a_tenth_is_held_out(tmp_path, size):
    made = write(tmp_path, (("train-0", 12), ("train-1", 28), ("test", 5)), size=size)
    data = HfParquet(**SETTINGS, root=str(tmp_path))
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [36, 4, 5]
    assert data.split("val").labels.tolist().count(1) == 2
    images = {data.split(s)[i][0].tobytes() for s in ("train", "val") for i in range(len(data.split(s)))}
    assert images == {p.tobytes() for p in made["train-0"] + made["train-1"]}
    assert same(data.split("test"), made["test"])
    assert data.evaluation_split == "test"


def test_a_test_set_without_labels_is_left_out(tmp_path, caplog):
    write(tmp_path)
    write_parquet(tmp_path / "test.parquet", [encoded(p) for p in pixels(3)], [-1] * 3)
    assert HfParquet(**SETTINGS, root=str(tmp_path)).evaluation_split == "val"
    assert "the test images have no labels, val is evaluated" in caplog.text


def test_columns_can_be_named(tmp_path):
    made = write(tmp_path, column="photo", label_column="kind")
    columns = {"image_column": "photo", "label_column": "kind"}
    data = HfParquet(**SETTINGS, **columns, root=str(tmp_path))
    assert same(data.split("val"), made["validation-00000-of-00001"])
    with pytest.raises(qat.UsageError, match=r"has columns photo, kind; one of img, image is needed; data\.image_column names another"):
        HfParquet(**SETTINGS, root=str(tmp_path)).split("val")
    with pytest.raises(qat.UsageError, match=r"one of label, labels, fine_label is needed; data\.label_column names another"):
        HfParquet(**SETTINGS, root=str(tmp_path), image_column="photo").split("val")
    with pytest.raises(qat.UsageError, match=r"data\.num_classes is not set: .* has 2 classes; set data\.num_classes=2"):
        HfParquet(**{**SETTINGS, "num_classes": None}, **columns, root=str(tmp_path))


def test_cells_of_bytes(tmp_path):
    made = pixels(6)
    table = {"image": pa.array([encoded(p) for p in made], type=pa.binary()), "label": pa.array([0, 1] * 3)}
    for name in ("train", "validation"):
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    assert same(HfParquet(**SETTINGS, root=str(tmp_path)).split("val"), made)


def test_the_number_of_classes_has_to_be_set(tmp_path):
    write(tmp_path)
    with pytest.raises(qat.UsageError, match=rf"data\.root='{tmp_path}' has 2 classes; set data\.num_classes=2$"):
        HfParquet(**{**SETTINGS, "num_classes": None}, root=str(tmp_path))


@pytest.mark.parametrize("size", [None, 10])
def test_a_damaged_image_is_named_or_skipped(tmp_path, caplog, size):
    made = pixels(6, size)
    contents = [encoded(p) for p in made]
    contents[2] = None
    for name in ("train", "validation"):
        write_parquet(tmp_path / f"{name}.parquet", contents, [0, 1] * 3)
    with pytest.raises(qat.UsageError, match=rf"{tmp_path}/(train|validation)\.parquet: image 2 cannot be decoded"):
        HfParquet(**SETTINGS, root=str(tmp_path)).split("val")[2]
    source = HfParquet(**SETTINGS, root=str(tmp_path), on_error="skip").split("val")
    kept = [*made[:2], *made[3:]] if size else [*made[:2], made[3], *made[3:]]
    assert same(source, kept)
    assert f"{tmp_path}/validation.parquet: image 2 cannot be decoded" in caplog.text


@pytest.mark.parametrize("root", [None, "/no/such"])
def test_the_folder_has_to_be_there(root):
    with pytest.raises(qat.UsageError, match=r"data\.root( is not set: give the folder that holds train\*|='/no/such': no such folder)"):
        HfParquet(**SETTINGS, root=root).train_dataloader()


def test_a_folder_without_training_images_is_named(tmp_path):
    write(tmp_path, (("test", 3),))
    with pytest.raises(qat.UsageError, match=rf"data\.root='{tmp_path}': holds no train\*\.parquet"):
        HfParquet(**SETTINGS, root=str(tmp_path)).train_dataloader()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_two_sets_of_one_split_are_refused(tmp_path, split):
    write(tmp_path, (("train", 4), ("val", 4), ("test", 4)))
    write(tmp_path / "data" / "older", ((split, 4),))
    has = rf"has data/older/data/{split}\.parquet and data/{split}\.parquet$"
    with pytest.raises(qat.UsageError, match=rf"^data\.root='{tmp_path}': must be a folder with one set of {split}\*\.parquet; {has}"):
        HfParquet(**SETTINGS, root=str(tmp_path)).train_dataloader()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_net_trains_and_is_evaluated_from_its_file(tmp_path, refused, in_memory):
    write(tmp_path / "files", size=10 if in_memory else None)
    small = ["data.image_size=16", "data.patch_size=8", "data.num_workers=0", "data.batch_size=8"]
    settings = ["data=hf_parquet", f"data.root={tmp_path}/files", *small]
    assert refused("train", compose("train", *settings, f"run_dir={tmp_path}/no")).endswith("set data.num_classes=2")
    run = train(tmp_path / "run", *settings, "data.num_classes=2")
    found = evaluate(tmp_path / "eval", f"ckpt={run}/checkpoints/best.ckpt")
    assert found["loss"] == pytest.approx(results(run)["loss"], rel=1e-5)
