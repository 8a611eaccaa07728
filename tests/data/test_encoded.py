"""Image files as they come: other modes, sizes and damages, in memory or decoded when needed.

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
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

import qat
from qat.data import ImageArrays, ImageFolder, encoded, image_transform
from qat.data.arrays import to_pixels
from qat.data.encoded import ImageError
from tests.conftest import results, tiny
from tests.data.files import SETTINGS, write_folder, write_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, bits, colours, rows):
    """A PNG written by hand: Pillow's own way of saving 16 bits depends on its version, and no image of 60,000 pixels a side is needed."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def animated():
    frames = [Image.fromarray(np.full((5, 7, 3), value, np.uint8)) for value in (40, 200)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


ODD = {
    "cmyk": lambda: saved(Image.fromarray(PIXELS).convert("CMYK"), "JPEG", quality=95),
    "palette": lambda: saved(Image.fromarray(PIXELS).convert("P", palette=Image.Palette.ADAPTIVE, colors=8), transparency=0),
    "rgba": lambda: saved(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]), "RGBA")),
    "grey with alpha": lambda: saved(Image.fromarray(PIXELS).convert("LA")),
    "one bit": lambda: saved(Image.fromarray(PIXELS).convert("1")),
    "one pixel": lambda: saved(Image.fromarray(PIXELS[:1, :1])),
    "animated": animated,
}
DAMAGED = {
    "empty": lambda: b"",
    "a text": lambda: b"this is no image\n" * 9,
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "cut jpeg": lambda: saved(Image.fromarray(PIXELS.repeat(30, 0).repeat(30, 1)), "JPEG")[:900],
    "cut png": lambda: saved(Image.fromarray(PIXELS))[:60],
    "a huge declared size": lambda: png(60000, 60000, 8, 2, b"\0"),
    "no pixels": lambda: png(0, 0, 8, 2, b"\0"),
    "32-bit floats": lambda: saved(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"),
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
    return ImageFolder(**{**SETTINGS, "num_classes": 1, "crop_pct": 1.0, "interpolation": "bicubic", "root": str(root), **changes})


def values(source):
    return [int(source[i][0].mean()) for i in range(len(source))]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("kind", ODD)
def test_pixels_are_those_of_pillow(kind):
    image = Image.open(io.BytesIO(ODD[kind]()))
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(to_pixels(encoded.open_image(ODD[kind]()), 3), expected)
    assert to_pixels(image, 1).shape == (*expected.shape[:2], 1)


def test_16_bit_grey_is_scaled_and_not_cut_off():
    values = np.array([[0, 256, 257, 128 * 257], [65535, 65280, 1, 40000]], dtype=np.uint16)
    content = png(4, 2, 16, 0, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    found = to_pixels(encoded.open_image(content), 1)[..., 0]
    assert found.tolist() == np.rint(values / 257).astype(int).tolist()
    assert np.array_equal(to_pixels(encoded.open_image(content), 3), found[..., None].repeat(3, axis=2))
    with pytest.raises(ValueError, match="what is white is not known"):
        to_pixels(Image.fromarray(np.array([[70000]], dtype=np.int32)), 1)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_ones_are_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was_run\n")
    (tmp_path / "gs").chmod(0o755)
    path = tmp_path / "a.jpg"
    path.write_bytes(DAMAGED[kind]())
    with pytest.raises(ImageError, match=rf"^{path} cannot be decoded \(.+\)$") as caught:
        image_transform(SETTINGS)(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("kind", ["pipe", "endless", "gone"])
def test_a_file_without_an_end_is_not_read(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind != "gone":
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ImageError, match=rf"^{path} cannot be decoded \(No such file"):
        image_transform(SETTINGS)(path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_all_that_is_broken_is_named_at_once_with_what_to_do(tmp_path, in_memory):
    with pytest.raises(ImageError) as caught:
        data(folder(tmp_path, damaged=[2, 5]), in_memory=in_memory).split("train")
    where = rf"{tmp_path}/train/a"
    assert re.fullmatch(
        rf"2 of 6 images: {where}/02\.png cannot be decoded \([^;]+\); {where}/05\.png cannot be decoded \([^;]+\); "
        r"data\.on_error=skip leaves out what cannot be decoded",
        str(caught.value),
    )
    with pytest.raises(ImageError, match=r"^25 of 30 images: .* \.\.\.; data\.on_error=skip") as caught:
        data(folder(tmp_path, damaged=range(25), n=30), in_memory=in_memory).split("train")
    assert str(caught.value).count("cannot be decoded (") == 20


def test_skip_replaces_by_the_next_that_can_be_decoded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(encoded, "TRIED_AT_MOST", 0)
    folder(tmp_path, damaged=[2, 3, 5])
    lazy = data(tmp_path, on_error="skip", in_memory=False).split("train")
    for _ in range(2):
        assert values(lazy) == [0, 10, 40, 40, 40, 0]
    for number, (line, file) in enumerate(zip(warnings(caplog), (2, 3, 5), strict=True)):
        assert f"{tmp_path}/train/a/0{file}.png cannot be decoded (" in line
        assert line.endswith(f"; the next image replaces it ({number + 1} so far)")


@pytest.mark.parametrize("tried", [0, 1000])
def test_nothing_but_damaged_images_is_refused(tmp_path, monkeypatch, tried):
    monkeypatch.setattr(encoded, "TRIED_AT_MOST", tried)
    with pytest.raises(qat.UsageError, match="none of 6 images can be decoded"):
        data(folder(tmp_path, damaged=range(6)), on_error="skip", in_memory=False).split("train")[4]


def test_what_does_not_fit_is_decoded_when_needed(tmp_path):
    root = str(write_folder(tmp_path, size=10))
    megabytes = 40 * 10 * 10 * 3 / 1e6
    small, large = (ImageFolder(**SETTINGS, root=root, memory_mb=mb).split("train") for mb in (megabytes * 0.99, megabytes))
    assert (type(small).__name__, type(large)) == ("FileImages", ImageArrays)
    assert all(np.array_equal(small[i][0], large[i][0]) for i in range(40))
    assert small.fingerprint() == large.fingerprint()


def test_the_line_survives_the_way_out_of_a_worker_process(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "TRIED_AT_MOST", 0)
    lazy = data(folder(tmp_path, damaged=[2]), in_memory=False).split("train")
    try:
        lazy[2]
    except ImageError:
        # What a loader's worker process sends; a real one would take seconds to be cleared away after an error.
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    assert "Traceback" in sent.exc_msg
    with pytest.raises(ImageError, match=rf"^{tmp_path}/train/a/02\.png cannot be decoded \([^\n]*\); data\.on_error=skip [^\n]*$"):
        sent.reraise()


def test_worker_processes_replace_the_same_images_and_name_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "TRIED_AT_MOST", 0)
    root = write_folder(tmp_path / "data")
    damaged = [root / "train" / "ant" / "003.JPEG", root / "train" / "bee" / "019.JPEG"]
    for path in damaged:
        path.write_bytes(b"no image")

    def epochs(workers):
        loader = data(root, num_classes=2, num_workers=workers, batch_size=8, augment="timm", on_error="skip").train_dataloader()
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


def test_a_run_says_at_its_end_what_it_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = write_folder(tmp_path / "data")
    for name in ("ant/003.JPEG", "bee/019.JPEG"):
        (root / "train" / name).write_bytes(b"no image")
    images = ("data=imagefolder", f"data.root={root}", "data.num_classes=2", "data.image_size=8", "data.patch_size=4", "data.batch_size=8")
    limits = ("trainer.limit_train_batches=1.0", "data.num_workers=1", "data.on_error=skip", "quant=fp")
    from qat.tasks.train import train

    train(tiny(tmp_path / "run", *images, *limits))
    assert "data.on_error=skip: 2 train images could not be decoded" in caplog.text
    assert results(tmp_path / "run")["left_out"] == {"train": 2}
