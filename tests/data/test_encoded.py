"""Images decoded when needed, and images that cannot be. Oracle: Pillow's own decoding of the same files."""

import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

import qat
from qat.data import DataSettings, ImageFolder, encoded
from qat.data.encoded import ImageError, LazyImages, read_all
from qat.data.imagefolder import list_files
from tests.data.files import write_folder, write_image

SETTINGS = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 2, "mean": [0.5] * 3, "std": [0.25] * 3}


def images(tmp_path, damaged=(), n=6):
    """Files 0 ... n-1 of one class; image i has the value 10 * i everywhere."""
    for i in range(n):
        path = write_image(tmp_path / "a" / f"{i}.png", 8, 8, value=10 * i % 256)
        if i in damaged:
            path.write_bytes(path.read_bytes()[:40])
    return list_files(tmp_path, ["a"])


def values(source):
    return [int(source[i][0].mean()) for i in range(len(source))]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_raise_names_file_and_reason(tmp_path, content):
    files = images(tmp_path, damaged=[2])
    if content is not None:
        (tmp_path / "a" / "2.png").write_bytes(content)
    lazy = LazyImages(files, chans=3, on_error="raise")
    assert lazy[1][0].shape == (8, 8, 3)
    for read in (lambda: lazy[2], lambda: read_all(files, 3, "raise")):
        with pytest.raises(qat.UsageError, match=rf"{tmp_path}/a/2\.png cannot be decoded \(.+\)") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [lambda files: read_all(files, 3, "raise"), lambda files: LazyImages(files, 3, "raise").try_all()])
def test_all_that_is_broken_is_named_at_once_with_what_to_do(tmp_path, read):
    with pytest.raises(ImageError) as caught:
        read(images(tmp_path, damaged=[2, 5]))
    assert re.fullmatch(
        rf"2 of 6 images: {tmp_path}/a/2\.png cannot be decoded \([^;]+\); {tmp_path}/a/5\.png cannot be decoded \([^;]+\); "
        r"data\.on_error=skip leaves out what cannot be decoded",
        str(caught.value),
    )


def test_of_many_broken_images_twenty_are_named(tmp_path):
    with pytest.raises(ImageError, match=r"^25 of 30 images: .* and 5 more; data\.on_error=skip") as caught:
        read_all(images(tmp_path, damaged=range(25), n=30), 3, "raise")
    assert str(caught.value).count("cannot be decoded (") == 20


@pytest.mark.parametrize(("number", "is_tried"), [(6, True), (7, False)])
def test_a_small_folder_is_tried_before_the_run(tmp_path, monkeypatch, caplog, number, is_tried):
    monkeypatch.setattr(encoded, "TRIED_AT_MOST", 6)
    files = images(tmp_path, damaged=[2], n=number)
    write_image(tmp_path / "a" / "1.png", 9, 8)  # not of one size: decoded when needed
    encoded.load(files, DataSettings(**SETTINGS | {"on_error": "skip"}))
    assert ["left out 1 of 6 images" in line for line in warnings(caplog)] == [True] * is_tried


def test_of_a_gif_the_first_picture_is_read(tmp_path):
    pictures = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    (tmp_path / "a").mkdir()
    pictures[0].save(tmp_path / "a" / "x.GIF", save_all=True, append_images=pictures[1:])
    assert values(LazyImages(list_files(tmp_path, ["a"]), 3, "raise")) == [10]


def test_a_file_that_has_gone_is_named(tmp_path):
    files = images(tmp_path)
    (tmp_path / "a" / "2.png").unlink()
    with pytest.raises(qat.UsageError, match=r"2\.png cannot be decoded \(.*No such file"):
        LazyImages(files, chans=3, on_error="raise")[2]


def test_skip_leaves_out_what_is_read_into_memory(tmp_path, caplog):
    arrays = read_all(images(tmp_path, damaged=[2, 5]), 3, "skip")
    assert values(arrays) == [0, 10, 30, 40]
    assert len(arrays.labels) == 4
    (line,) = warnings(caplog)
    assert line.startswith("data.on_error=skip: left out 2 of 6 images: ")
    assert f"{tmp_path}/a/2.png cannot be decoded (" in line
    assert f"{tmp_path}/a/5.png cannot be decoded (" in line


def test_skip_replaces_by_the_next_that_can_be_decoded(tmp_path, caplog):
    lazy = LazyImages(images(tmp_path, damaged=[2, 3, 5]), chans=3, on_error="skip")
    assert values(lazy) == [0, 10, 40, 40, 40, 0]
    assert values(lazy) == [0, 10, 40, 40, 40, 0]
    named = warnings(caplog)
    assert len(named) == 3
    for number, (line, file) in enumerate(zip(named, (2, 3, 5), strict=True)):
        assert f"{tmp_path}/a/{file}.png cannot be decoded (" in line
        assert line.endswith(f"; the next image replaces it ({number + 1} so far)")
    backwards = LazyImages(images(tmp_path, damaged=[2, 3, 5]), chans=3, on_error="skip")
    assert [int(backwards[i][0].mean()) for i in range(5, -1, -1)] == [0, 40, 40, 40, 10, 0]


@pytest.mark.parametrize("read", ["memory", "lazy"])
def test_nothing_but_damaged_images_is_refused(tmp_path, read):
    files = images(tmp_path, damaged=range(6))
    with pytest.raises(qat.UsageError, match="no images|none of 6 images can be decoded"):
        read_all(files, 3, "skip") if read == "memory" else LazyImages(files, 3, "skip")[4]


@pytest.mark.parametrize("chans", [1, 3])
def test_grey_and_colour(tmp_path, chans):
    files = images(tmp_path)
    image, label = LazyImages(files, chans, "raise")[3]
    assert image.shape == (8, 8, chans)
    assert image.dtype == np.uint8
    assert label == 0
    assert np.array_equal(image[..., 0], np.full((8, 8), 30))


def test_the_line_survives_the_way_out_of_a_worker_process(tmp_path):
    lazy = LazyImages(images(tmp_path, damaged=[2]), chans=3, on_error="raise")
    try:
        lazy[2]
    except ImageError:
        # What a loader's worker process sends; a real one would take seconds to be cleared away after an error.
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    assert "Traceback" in sent.exc_msg
    with pytest.raises(ImageError, match=rf"^{tmp_path}/a/2\.png cannot be decoded \([^\n]*\); data\.on_error=skip [^\n]*$"):
        sent.reraise()


def test_worker_processes_replace_the_same_images_and_name_each_once(tmp_path):
    root = write_folder(tmp_path / "data")
    damaged = [root / "train" / "ant" / "003.JPEG", root / "train" / "bee" / "019.JPEG"]
    for path in damaged:
        path.write_bytes(b"no image")

    def epochs(workers):
        data = ImageFolder(**SETTINGS, root=str(root), num_workers=workers, batch_size=8, augment="timm", on_error="skip")
        loader = data.train_dataloader()
        return torch.cat([batch for epoch in range(4) if loader.sampler.set_epoch(epoch) is None for batch, _ in loader])

    here = epochs(0)
    # What a worker process logs is seen in a file only.
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("qat.data.encoded").addHandler(handler)
    try:
        assert torch.equal(epochs(2), here)
    finally:
        logging.getLogger("qat.data.encoded").removeHandler(handler)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [sum(f"{path} cannot be decoded" in line for line in lines) for path in damaged] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "ignore"}, r"data\.on_error='ignore': must be one of raise, skip"),
        ({"in_memory": "yes"}, r"data\.in_memory='yes': must be true or false"),
        ({"cache": "yes"}, r"data\.cache='yes': must be one of auto, true, false"),
        ({"cache": None}, r"data\.cache=None: must be one of auto, true, false"),
        ({"cache": 1}, r"data\.cache=1: must be one of auto, true, false"),
        ({"memory_mb": -1}, r"data\.memory_mb=-1: must be a number of at least 0"),
        ({"memory_mb": True}, r"data\.memory_mb=True: must be a number of at least 0"),
        ({"crop_pct": 0}, r"data\.crop_pct=0: must be a number above 0 to 1"),
        ({"crop_pct": 1.1}, r"data\.crop_pct=1\.1: "),
        ({"crop_pct": True}, r"data\.crop_pct=True: "),
        ({"crop_pct": "a"}, r"data\.crop_pct='a': "),
        ({"interpolation": "best"}, r"data\.interpolation='best': must be one of nearest, bilinear, bicubic, lanczos"),
    ],
)
def test_bad_settings_name_themselves(settings, message):
    with pytest.raises(qat.UsageError, match=message):
        ImageFolder(**{**SETTINGS, **settings})
