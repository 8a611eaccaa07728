"""Encoded images in parquet files, as Hugging Face writes them. Oracle: Pillow's own decoding of the same bytes."""

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import qat
from qat.data.parquet import find_parquet
from tests.conftest import encoded, write_parquet
from tests.data.files import read_parquet

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)


def decoded(content, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(content)).convert(mode))


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
def test_images_and_labels(tmp_path, fmt, column):
    contents = [encoded(p, fmt) for p in PIXELS]
    write_parquet(tmp_path / "train.parquet", contents, [3, 1, 2, 0], column=column)
    arrays = read_parquet([tmp_path / "train.parquet"], chans=3)
    assert arrays.labels.tolist() == [3, 1, 2, 0]
    assert arrays.images.dtype == np.uint8
    assert np.array_equal(arrays.images, np.stack([decoded(c) for c in contents]))
    if fmt == "PNG":
        assert np.array_equal(arrays.images, PIXELS)


@pytest.mark.parametrize("label_column", ["label", "labels", "fine_label"])
def test_label_columns(tmp_path, label_column):
    write_parquet(tmp_path / "train.parquet", [encoded(p) for p in PIXELS], [3, 1, 2, 0], label_column=label_column)
    assert read_parquet([tmp_path / "train.parquet"], chans=3).labels.tolist() == [3, 1, 2, 0]


def test_grey_and_colour_are_converted_to_what_is_asked_for(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encoded(PIXELS[0]), encoded(PIXELS[1, :, :, 0])], [0, 1])
    colour = read_parquet([tmp_path / "train.parquet"], chans=3).images
    assert np.array_equal(colour[1], np.repeat(PIXELS[1, :, :, :1], 3, axis=2))
    grey = read_parquet([tmp_path / "train.parquet"], chans=1).images
    assert grey.shape == (2, 6, 6, 1)
    assert np.array_equal(grey[0, :, :, 0], decoded(encoded(PIXELS[0]), "L"))


def test_files_are_joined_in_order_of_their_names(tmp_path):
    for number in (1, 0):
        contents = [encoded(PIXELS[number])]
        write_parquet(tmp_path / "plain_text" / f"train-0000{number}-of-00002.parquet", contents, [number])
    write_parquet(tmp_path / "plain_text" / "test-00000-of-00001.parquet", [encoded(PIXELS[2])], [7])
    assert read_parquet(find_parquet(str(tmp_path), "train"), chans=3).labels.tolist() == [0, 1]
    assert read_parquet(find_parquet(str(tmp_path), "test"), chans=3).labels.tolist() == [7]


@pytest.mark.parametrize(
    "names", [("train_0", "train_1"), ("train-00000-of-00002-0123456789abcdef", "train-00001-of-00002-fedcba9876543210")]
)
def test_shards_may_be_numbered_otherwise(tmp_path, names):
    for name in names:
        write_parquet(tmp_path / f"{name}.parquet", [], [])
    assert [file.stem for file in find_parquet(str(tmp_path), "train")] == list(names)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("snapshots/a/train-00000-of-00001", "snapshots/b/train-00000-of-00001"),
        ("backup/train-1", "train-0"),
        ("train-00000-of-00001", "train_small-00000-of-00001"),
        ("train-00000-of-00001", "train-00001-of-00002"),
        ("train-00000-of-00001-0123456789abcdef", "train-00000-of-00001"),
        ("train-0", "train"),
        ("train", "train_copy"),
    ],
)
def test_two_sets_of_one_split_are_refused(tmp_path, one, other):
    for name in (one, other):
        write_parquet(tmp_path / f"{name}.parquet", [], [])
    line = f"data.root='{tmp_path}': must be a folder with one set of train*.parquet; has {one}.parquet and {other}.parquet"
    with pytest.raises(qat.UsageError, match=f"^{re.escape(line)}$"):
        find_parquet(str(tmp_path), "train")


def test_the_folder_has_to_be_named():
    with pytest.raises(qat.UsageError, match=r"data\.root is not set: give the folder that holds train\*\.parquet"):
        find_parquet(None, "train")


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(qat.UsageError, match=r"data\.root='/no/such': no such folder"):
        find_parquet("/no/such", "train")


def test_a_folder_without_such_files_is_named(tmp_path):
    write_parquet(tmp_path / "test.parquet", [encoded(PIXELS[0])], [0])
    with pytest.raises(qat.UsageError, match=rf"data\.root='{tmp_path}': holds no train\*\.parquet"):
        find_parquet(str(tmp_path), "train")


def damage(path, kind):
    write_parquet(path, [encoded(p) for p in PIXELS], [0, 1, 2, 3])
    content = path.read_bytes()
    changed = {"text": b"hello", "empty": b"", "cut": content[: len(content) // 2], "data lost": content[:4] + bytes(200) + content[204:]}
    path.write_bytes(changed[kind])


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "data lost"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, kind):
    path = tmp_path / "train.parquet"
    damage(path, kind)
    with pytest.raises(qat.UsageError, match=rf"{path}: cannot be read as parquet"):
        read_parquet([path], chans=3)


@pytest.mark.parametrize("content", [b"no image", b"", None, encoded(PIXELS[0])[:60]])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, content):
    path = tmp_path / "train.parquet"
    write_parquet(path, [encoded(PIXELS[0]), content], [0, 1])
    with pytest.raises(qat.UsageError, match=rf"{path}: image 1 cannot be decoded"):
        read_parquet([path], chans=3)


def test_a_file_without_images_is_refused_with_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(qat.UsageError, match=r"train\.parquet: has columns text, label; one of img, image is needed"):
        read_parquet([tmp_path / "train.parquet"], chans=3)


def test_a_file_without_labels_is_refused_with_its_columns(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encoded(PIXELS[0])], [0], label_column="name")
    with pytest.raises(qat.UsageError, match=r"has columns img, name; one of label, labels, fine_label is needed"):
        read_parquet([tmp_path / "train.parquet"], chans=3)


def test_a_missing_label_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encoded(p) for p in PIXELS[:2]], [0, None])
    with pytest.raises(qat.UsageError, match=r"train\.parquet: label None of image 1 is not a whole number"):
        read_parquet([tmp_path / "train.parquet"], chans=3)


def test_a_file_without_rows_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [], [])
    with pytest.raises(qat.UsageError, match=rf"{tmp_path}/train\.parquet: no images"):
        read_parquet([tmp_path / "train.parquet"], chans=3)


def test_images_of_different_sizes_are_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encoded(PIXELS[0]), encoded(PIXELS[1, :4])], [0, 1])
    with pytest.raises(qat.UsageError, match="images have different sizes"):
        read_parquet([tmp_path / "train.parquet"], chans=3)
