"""Image files of other modes and sizes, or damaged, in memory or decoded when needed.

Oracle: Pillow's own `convert("RGB")`, as torchvision and timm load images, and pixels that are known by construction.
"""

import io
import logging
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from qat.data import ImageArrays, ImageFolder, image_transform
from qat.data.sources import ImageError, open_image, to_pixels
from tests.data.files import SETTINGS, write_folder, write_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width, height, bits, colours, rows):
    """A PNG written by hand: Pillow's own way of saving 16 bits depends on its version, and no image of 60,000 pixels a side is needed."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def animated():
    frames = [Image.fromarray(np.full((5, 7, 3), value, np.uint8)) for value in (40, 200)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


ODD = {
    "cmyk": lambda: saved(Image.fromarray(PIXELS).convert("CMYK"), "JPEG", quality=95),
    "palette": lambda: saved(
        Image.fromarray(PIXELS).convert("P", palette=Image.Palette.ADAPTIVE, colors=8),
        transparency=0,
    ),
    "rgba": lambda: saved(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]), "RGBA")),
    "grey with alpha": lambda: saved(Image.fromarray(PIXELS).convert("LA")),
    "one bit": lambda: saved(Image.fromarray(PIXELS).convert("1")),
    "one pixel": lambda: saved(Image.fromarray(PIXELS[:1, :1])),
    "animated": animated,
}
DAMAGED = {
    "empty": lambda: b"",
    "a text": lambda: b"this is no image\n" * 9,
    "postscript": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    ),
    "cut jpeg": lambda: saved(Image.fromarray(PIXELS.repeat(30, 0).repeat(30, 1)), "JPEG")[:900],
    "cut png": lambda: saved(Image.fromarray(PIXELS))[:60],
    "a huge declared size": lambda: png(60000, 60000, 8, 2, b"\0"),
    "no pixels": lambda: png(0, 0, 8, 2, b"\0"),
}


def folder(root, damaged=(), n=6):
    """Files 0 ... n-1 of one class, in train and val; image i has the value 10 * i everywhere."""
    for split in ("train", "val"):
        for i in range(n):
            path = write_image(root / split / "a" / f"{i:02}.png", 8, 8, value=10 * i % 256)
            if i in damaged and split == "train":
                path.write_bytes(path.read_bytes()[:40])
    return root


def data(root, **changes):
    return ImageFolder(**{
        **SETTINGS,
        "num_classes": 1,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "root": str(root),
        **changes,
    })


@pytest.mark.parametrize("kind", ODD)
def test_pixels_are_those_of_pillow(kind):
    image = Image.open(io.BytesIO(ODD[kind]()))
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(to_pixels(open_image(ODD[kind]()), 3), expected)
    assert to_pixels(image, 1).shape == (*expected.shape[:2], 1)


def test_16_bit_grey_is_scaled_and_not_cut_off():
    values = np.array([[0, 256, 257, 128 * 257], [65535, 65280, 1, 40000]], dtype=np.uint16)
    content = png(4, 2, 16, 0, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    found = to_pixels(open_image(content), 1)[..., 0]
    assert found.tolist() == np.rint(values / 257).astype(int).tolist()
    assert np.array_equal(to_pixels(open_image(content), 3), found[..., None].repeat(3, axis=2))
    for odd in (np.array([[70000]], np.int32), np.zeros((2, 2), np.float32)):
        with pytest.raises(ValueError, match="no defined white level"):
            to_pixels(Image.fromarray(odd), 1)


@pytest.mark.parametrize("kind", ["pipe", "endless", "gone"])
def test_a_file_without_an_end_is_not_read(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind != "gone":
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ImageError, match=rf"^{path} cannot be decoded \(No such file"):
        image_transform(SETTINGS)(path)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_ones_are_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was_run\n")
    (tmp_path / "gs").chmod(0o755)
    path = tmp_path / "a.jpg"
    path.write_bytes(DAMAGED[kind]())
    with pytest.raises(ImageError, match=rf"^{path} cannot be decoded \(.+\)$") as caught:
        image_transform(SETTINGS)(path)
    assert not re.search(r"\n| at 0x", str(caught.value))
    assert not (tmp_path / "was_run").exists()


def test_a_damaged_image_is_named(tmp_path):
    folder(tmp_path, damaged=[2])
    line = rf"^{tmp_path}/train/a/02\.png cannot be decoded \([^\n]*on_error=skip[^\n]*$"
    with pytest.raises(ImageError, match=line):
        data(tmp_path).split("train")
    lazy = data(tmp_path, memory_mb=0).split("train")
    assert int(lazy[1][0].mean()) == 10
    try:
        lazy[2]
    except ImageError:
        # What a loader's worker process sends; a real one would take seconds to end after an error.
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    assert "Traceback" in sent.exc_msg
    with pytest.raises(ImageError, match=line):
        sent.reraise()


@pytest.mark.parametrize("memory_mb", [4096, 0])
def test_skipped_the_next_image_takes_its_place(tmp_path, caplog, memory_mb):
    found = data(folder(tmp_path, damaged=[2, 5]), memory_mb=memory_mb, on_error="skip").split(
        "train"
    )
    for _ in range(2):
        assert [int(found[i][0].mean()) for i in range(len(found))] == [0, 10, 30, 30, 40, 0]
    assert [record.getMessage().partition(" cannot")[0] for record in caplog.records] == [
        f"data.on_error=skip: {tmp_path}/train/a/0{n}.png" for n in (2, 5)
    ]
    for i in range(6):
        (tmp_path / f"train/a/0{i}.png").write_bytes(b"")
    with pytest.raises(ImageError, match="no image can be decoded"):
        data(tmp_path, memory_mb=memory_mb, on_error="skip").split("train")[0]


@pytest.mark.parametrize("memory_mb", [4096, 0])
def test_an_image_that_takes_another_ones_place_has_its_own_label(tmp_path, memory_mb):
    root = write_folder(tmp_path, size=10)
    (root / "train" / "ant" / "019.JPEG").write_bytes(b"")  # the last one of its class
    source = data(root, num_classes=2, memory_mb=memory_mb, on_error="skip").split("train")
    assert [source[i][1] for i in range(40)] == [0] * 19 + [1] * 21


def test_workers_say_once_what_they_skip(tmp_path):
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("qat.data.sources").addHandler(handler)
    found = data(folder(tmp_path, damaged=[2]), memory_mb=0, on_error="skip").split("train")
    for _ in range(2):
        assert len(list(DataLoader(found, num_workers=1))) == len(found)
    logging.getLogger("qat.data.sources").removeHandler(handler)
    assert (tmp_path / "log").read_text().count("02.png") == 1


def test_what_does_not_fit_is_decoded_when_needed(tmp_path):
    root = str(write_folder(tmp_path, size=10))
    megabytes = 40 * 10 * 10 * 3 / 1e6
    small, large = (
        ImageFolder(**SETTINGS, root=root, memory_mb=mb).split("train")
        for mb in (megabytes * 0.99, megabytes)
    )
    assert (type(small).__name__, type(large)) == ("FileImages", ImageArrays)
    assert all(np.array_equal(small[i][0], large[i][0]) for i in range(40))
    assert small.fingerprint() == large.fingerprint()
