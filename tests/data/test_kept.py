"""What is kept on the disk between runs. Oracle: the pixels that were written; decoding again."""

import logging
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from qat.data import Cifar10, HfParquet, ImageArrays, ImageFolder, kept
from qat.data import encoded as encoded_images
from qat.data.encoded import LazyImages
from qat.data.parquet import ParquetImages
from tests.conftest import encoded, write_parquet
from tests.data.files import read_parquet, settings, write_folder

SETTINGS = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
LABELS = [i % 2 for i in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", [encoded(p) for p in PIXELS], LABELS)
    return tmp_path / "data" / "train.parquet"


@pytest.fixture
def decoding(monkeypatch):
    """How often images were decoded."""
    calls, read = [], encoded_images.read_all
    monkeypatch.setattr(encoded_images, "read_all", lambda *args: calls.append(args) or read(*args))
    return calls


def files(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []


def same(arrays, pixels=PIXELS):
    return arrays.images.dtype == np.uint8 and np.array_equal(arrays.images, pixels)


def test_a_second_run_maps_what_the_first_has_decoded(file, cache, decoding):
    first = read_parquet([file], 3, cache=True)
    second = read_parquet([file], 3, cache=True)
    assert len(decoding) == 1
    assert same(first)
    assert same(second)
    assert second.labels.tolist() == LABELS
    assert isinstance(second.images.base, np.memmap), "processes of a machine share what is mapped"
    assert not second.images.flags.writeable
    assert [name.partition(".")[2] for name in files(cache)] == ["npy"]


@pytest.mark.parametrize(
    ("setting", "seconds", "is_kept"), [("auto", 0.1, False), ("auto", 2.1, True), (True, 0.1, True), (False, 9, False)]
)
def test_what_was_slow_is_kept(file, monkeypatch, tmp_path, setting, seconds, is_kept):
    clock = iter([0.0, seconds])
    monkeypatch.setattr(encoded_images, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert same(encoded_images.decoded(ParquetImages([file]), settings(cache=setting)))
    assert bool(list(tmp_path.rglob("*.npy"))) == is_kept


def test_a_changed_file_is_decoded_again(file, decoding):
    read_parquet([file], 3, cache=True)
    before = file.stat()
    write_parquet(file, [encoded(p) for p in PIXELS[::-1]], LABELS)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert same(read_parquet([file], 3, cache=True), PIXELS[::-1])
    assert read_parquet([file], 1, cache=True).images.shape == (40, 8, 8, 1), "grey ones are others"
    rows = np.asarray([3, 1])
    assert same(encoded_images.decoded(ParquetImages([file]).take(rows), settings(cache=True)), PIXELS[::-1][rows])
    assert len(decoding) == 4


@pytest.mark.parametrize("how", ["short", "pickle", "empty"])
def test_a_damaged_copy_is_made_anew(file, cache, decoding, how):
    read_parquet([file], 3, cache=True)
    (path,) = cache.glob("*.npy")
    content = path.read_bytes()
    if how == "pickle":
        np.save(path, np.asarray([print] * 40, dtype=object), allow_pickle=True)
    else:
        path.write_bytes({"short": content[:-9], "empty": b""}[how])
    assert same(read_parquet([file], 3, cache=True))
    assert len(decoding) == 2
    assert same(read_parquet([file], 3, cache=True))
    assert len(decoding) == 2
    assert len(files(cache)) == 1


def test_what_no_run_has_used_for_a_week_goes(file, cache, decoding):
    read_parquet([file], 3, cache=True)
    read_parquet([file], 1, cache=True)
    theirs = cache / "theirs.npy"  # of whoever has pointed QAT_CACHE_DIR at a folder of their own
    theirs.touch()
    for path in cache.iterdir():
        os.utime(path, (1e9, 1e9))
    read_parquet([file], 3, cache=True)  # this one is used
    os.utime(file, (1e9, 1e9))
    read_parquet([file], 3, cache=True)
    assert len(decoding) == 3
    assert len(files(cache)) == 3
    assert theirs.exists()


def test_a_cache_that_cannot_be_written_is_said_and_no_error(file, cache, caplog):
    cache.write_text("a file")
    assert same(read_parquet([file], 3, cache=True))
    assert "cannot be kept for the next run" in caplog.text


def test_images_that_cannot_be_decoded_are_named_each_time(tmp_path, cache, caplog):
    write_parquet(tmp_path / "train.parquet", [encoded(PIXELS[0]), b"no image"], [0, 1])
    for number in (1, 2):
        assert read_parquet([tmp_path / "train.parquet"], 3, on_error="skip", cache=True).left_out == 1
        assert caplog.text.count("left out 1 of 2 images") == number
    assert files(cache) == []


def test_several_may_start_at_once(file, cache):
    found = []
    threads = [threading.Thread(target=lambda: found.append(read_parquet([file], 3, cache=True))) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert [same(one) for one in found] == [True] * 4
    assert len(files(cache)) == 1


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.delenv("QAT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept.cache_folder() == tmp_path / ".cache" / "qat" / "images"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(kept.cache_folder()) == "/caches/qat/images"


def test_datasets_keep_what_they_decode(tmp_path, file, decoding):
    write_parquet(file.parent / "test.parquet", [encoded(p) for p in PIXELS[:10]], LABELS[:10])
    folder = write_folder(tmp_path / "folder", size=8)
    for made in (
        lambda: Cifar10(**SETTINGS, root=str(file.parent), cache=True),
        lambda: HfParquet(**SETTINGS, root=str(file.parent), cache=True),
        lambda: ImageFolder(**SETTINGS, root=str(folder), cache=True),
    ):
        decoding.clear()
        first = made()
        _ = first.splits
        assert len(decoding) in {2, 3}
        decoding.clear()
        second = made()
        assert all(np.array_equal(first.split(name).images, second.split(name).images) for name in second.splits)
        assert decoding == []
    image = next((folder / "train").rglob("*.png"))
    os.utime(image, ns=(0, 1))
    third = ImageFolder(**SETTINGS, root=str(folder), cache=True)
    assert third.splits
    assert len(decoding) == 1, "the split with the changed file"


def test_what_does_not_fit_is_decoded_when_needed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = str(write_folder(tmp_path, size=10))
    images = 40 * 10 * 10 * 3 / 1e6
    small, large = (ImageFolder(**SETTINGS, root=root, memory_mb=mb) for mb in (images * 0.99, images))
    assert isinstance(small.split("train"), LazyImages)
    assert isinstance(large.split("train"), ImageArrays)
    assert f"{tmp_path}/train: 0 MB once decoded, data.memory_mb=0.01188: decoded when needed" in caplog.text
    assert all(np.array_equal(small.split("train")[i][0], large.split("train")[i][0]) for i in range(40))


@pytest.mark.parametrize("augment", ["none", "light", "timm"])
def test_small_images_whose_squares_do_not_fit_are_resized_when_needed(file, augment):
    write_parquet(file.parent / "test.parquet", [encoded(p) for p in PIXELS[:10]], LABELS[:10])
    chosen = {**SETTINGS, "image_size": 16, "root": str(file.parent), "batch_size": 4, "augment": augment, "hflip": 0.5}
    small, large = (Cifar10(**chosen, memory_mb=mb) for mb in (36 * 16 * 16 * 3 / 1e6 - 1e-6, 36 * 16 * 16 * 3 / 1e6))
    assert [data.split("train").images.shape[1] for data in (small, large)] == [8, 16]
    batches = ([*data.train_dataloader(), *data.test_dataloader()] for data in (small, large))
    for ours, theirs in zip(*batches, strict=True):
        assert ours[0].equal(theirs[0])
        assert ours[1].equal(theirs[1])


def test_encoded_images_that_are_many_are_said_to_be_in_memory(tmp_path, caplog):
    write_parquet(tmp_path / "data" / "train.parquet", [encoded(PIXELS[i][: 5 + i % 3]) for i in range(40)], LABELS)
    data = HfParquet(**SETTINGS, root=str(tmp_path / "data"), memory_mb=0.001)
    assert isinstance(data.split("train"), LazyImages)
    assert "MB of encoded images are in memory; data=timm can map them" in caplog.text
