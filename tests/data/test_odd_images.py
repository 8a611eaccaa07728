"""Image files as they come: other modes, sizes and damages.

Oracle: Pillow's own `convert("RGB")`, as torchvision and timm load images, and pixels that are known by construction.
"""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import qat
from qat.data import Cifar10, HfParquet, ImageFolder
from qat.data.arrays import to_pixels
from qat.data.encoded import ImageError, LazyImages
from qat.data.image_transform import image_transform
from tests.conftest import encoded, results, tiny, write_cifar, write_parquet
from tests.data.files import write_folder

SETTINGS = {"image_size": 8, "patch_size": 4, "in_chans": 3, "num_classes": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def decode(content, chans):
    return to_pixels(Image.open(io.BytesIO(content)), chans)


def saved(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_16_bit(values):
    """A grey PNG of 16 bits, written by hand: Pillow's own way of saving one depends on its version."""
    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def of_a_declared_size(side):
    """A PNG of a few bytes that says it is `side` pixels wide and high."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def palette():
    image = Image.fromarray(PIXELS).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    image.info["transparency"] = 0
    return saved(image, transparency=0)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(PIXELS), "JPEG", exif=exif.tobytes(), quality=95)


def animated():
    frames = [Image.fromarray(np.full((5, 7, 3), value, np.uint8)) for value in (40, 200)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


ODD = {
    "cmyk": lambda: saved(Image.fromarray(PIXELS).convert("CMYK"), "JPEG", quality=95),
    "palette with transparency": palette,
    "rgba": lambda: saved(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]), "RGBA")),
    "grey with alpha": lambda: saved(Image.fromarray(PIXELS).convert("LA")),
    "one bit": lambda: saved(Image.fromarray(PIXELS).convert("1")),
    "one pixel": lambda: saved(Image.fromarray(PIXELS[:1, :1])),
    "rotated by exif": rotated,
    "animated": animated,
    "progressive": lambda: saved(Image.fromarray(PIXELS), "JPEG", progressive=True),
}
DAMAGED = {
    "empty": lambda: b"",
    "a text": lambda: b"this is no image\n" * 9,
    "html": lambda: b"<html>404</html>",
    "cut jpeg": lambda: saved(Image.fromarray(PIXELS.repeat(30, 0).repeat(30, 1)), "JPEG")[:900],
    "cut png": lambda: saved(Image.fromarray(PIXELS))[:60],
    "a huge declared size": lambda: of_a_declared_size(60000),
    "no pixels": lambda: of_a_declared_size(0),
    "32-bit floats": lambda: saved(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("kind", ODD)
def test_pixels_are_those_of_pillow(kind):
    content = ODD[kind]()
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    found = decode(content, 3)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)
    assert decode(content, 1).shape == (*expected.shape[:2], 1)


def test_a_rotation_in_exif_is_left_to_the_net():
    assert decode(rotated(), 3).shape == PIXELS.shape


def test_of_an_animation_the_first_image_counts():
    assert np.abs(decode(animated(), 3).astype(int) - 40).max() <= 2


def test_16_bit_grey_is_scaled_and_not_cut_off():
    values = np.array([[0, 256, 257, 128 * 257], [65535, 65280, 1, 40000]], dtype=np.uint16)
    found = decode(png_16_bit(values), 1)[..., 0]
    assert found.tolist() == np.rint(values / 257).astype(int).tolist()
    assert found[0].tolist() == [0, 1, 1, 128]
    assert np.array_equal(decode(png_16_bit(values), 3), found[..., None].repeat(3, axis=2))


def test_32_bit_integers_beyond_16_are_refused():
    with pytest.raises(ValueError, match="what is white is not known"):
        to_pixels(Image.fromarray(np.array([[70000]], dtype=np.int32)), 1)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_ones_are_one_line(tmp_path, kind):
    path = tmp_path / "a.jpg"
    path.write_bytes(DAMAGED[kind]())
    with pytest.raises(ImageError, match=rf"{path} cannot be decoded \(.+\)") as caught:
        image_transform(SETTINGS)(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("in_memory", [True, False])
def test_damaged_ones_can_be_skipped_and_are_counted(tmp_path, caplog, kind, in_memory):
    root = write_folder(tmp_path, size=8)
    for name in ("ant/003.JPEG", "bee/000.png"):
        (root / "train" / name).write_bytes(DAMAGED[kind]())
    data = ImageFolder(**SETTINGS, root=str(root), on_error="skip", in_memory=in_memory)
    source = data.split("train")
    shapes = {source[i][0].shape for i in range(len(source))}
    assert shapes == {(8, 8, 3)}
    # One that says it is of another size than the rest has all of them decoded when needed.
    assert len(source) == (40 if isinstance(source, LazyImages) else 38)
    assert data.left_out() == {"train": 2}
    assert "ant/003.JPEG cannot be decoded" in caplog.text
    whole = ImageFolder(**SETTINGS, root=str(root), in_memory=in_memory)
    with pytest.raises(qat.UsageError, match=r"cannot be decoded"):
        [whole.split("train")[i] for i in range(40)]


@pytest.mark.parametrize("kind", ["a text", "empty"])
def test_parquet_files_are_counted_too(tmp_path, kind):
    contents = [encoded(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)]
    contents[5] = DAMAGED[kind]()
    write_parquet(tmp_path / "hf" / "train.parquet", contents, [i % 2 for i in range(40)])
    write_parquet(tmp_path / "hf" / "val.parquet", contents[:4], [0, 1, 0, 1])
    data = HfParquet(**SETTINGS, root=str(tmp_path / "hf"), on_error="skip")
    assert (len(data.split("train")), data.left_out()) == (39, {"train": 1})
    root = write_cifar(tmp_path / "cifar")
    images = [encoded(pixels) for pixels in np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)]
    write_parquet(root / "train.parquet", [*images[:-1], DAMAGED[kind]()], [i % 4 for i in range(40)])
    cifar = Cifar10(**{**SETTINGS, "num_classes": 4, "image_size": 32}, root=str(root), on_error="skip")
    assert (len(cifar.split("train")) + len(cifar.split("val")), cifar.left_out()) == (39, {"train": 1})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_says_at_its_end_what_it_left_out(tmp_path, caplog, workers):
    caplog.set_level(logging.INFO)
    root = write_folder(tmp_path / "data")
    for name in ("ant/003.JPEG", "bee/019.JPEG"):
        (root / "train" / name).write_bytes(b"no image")
    data = ("data=imagefolder", f"data.root={root}", "data.num_classes=2", "data.image_size=8", "data.patch_size=4", "data.batch_size=8")
    limits = ("trainer.limit_train_batches=1.0", f"data.num_workers={workers}", "data.on_error=skip", "quant=fp")
    from qat.tasks.train import train

    train(tiny(tmp_path / "run", *data, *limits))
    assert "data.on_error=skip: 2 train images could not be decoded" in caplog.text
    assert results(tmp_path / "run")["left_out"] == {"train": 2}
