"""Preparation of a single image for evaluation. Oracle: the validation loader of the dataset that the image is from, bit for bit."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qat.data import (
    DataSettings,
    ImageArrays,
    ImageData,
    ImageFolder,
    image_transform,
)
from qat.tasks import build
from tests.conftest import compose, encoded
from tests.data.files import DIGITS, GREY, SETTINGS, write_folder
from tests.errors import usage_error

COLOURS = {**SETTINGS, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.2]}
# Of augmentation nothing may come through.
RECIPE = {"augment": "timm", "mixup": 0.8, "num_workers": 0}


def validation(data):
    return torch.cat([images for images, _ in data.val_dataloader()])


@pytest.mark.parametrize("memory_mb", [4096, 0])
@pytest.mark.parametrize("changes", [{}, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize(
    "crop",
    [{}, {"crop_pct": 0.7, "interpolation": "bilinear"}, {"model": "vit_small_patch16_224"}],
    ids=str,
)
@pytest.mark.parametrize("size", [None, 16])
def test_files_of_an_image_folder(tmp_path, size, crop, changes, memory_mb):
    root = write_folder(tmp_path, size=size)
    data = ImageFolder(
        **{**COLOURS, **RECIPE, **changes, **crop}, root=str(root), memory_mb=memory_mb
    )
    transform = image_transform(data.settings)
    paths = [path for name in ("ant", "bee") for path in sorted((root / "val" / name).iterdir())]
    expected = validation(data)
    for read in (Path, str, Image.open, lambda path: np.asarray(Image.open(path))):
        assert torch.equal(torch.stack([transform(read(path)) for path in paths]), expected)


def png():
    return encoded(np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name", ["digits", "cifar10", "fashion_mnist", "imagefolder", "imagenet", "hf_parquet"]
)
def test_a_stored_config_gives_the_settings_of_its_dataset(tmp_path, name):
    cfg = compose(
        "train",
        f"data={name}",
        "model=vit_s",
        "data.num_classes=10",
        "run_dir=a",
        *([] if name == "digits" else [f"data.root={tmp_path}"]),
    )
    stored, image = build.to_plain(cfg.data), Image.open(io.BytesIO(png()))
    assert torch.equal(
        image_transform(stored)(image), image_transform(build.build_data(cfg).settings)(image)
    )
    assert stored == build.to_plain(cfg.data)


def test_plain_settings_do_and_those_of_a_reader_that_was_removed():
    image = Image.open(io.BytesIO(png()))
    plain = {**COLOURS, "crop_pct": 0.9, "interpolation": "bicubic"}
    removed = {**plain, "_target_": "qat.data.Timm", "name": "wds/photos", "cache": "auto"}
    expected = image_transform(DataSettings(**plain))(image)
    assert torch.equal(image_transform(plain)(image), expected)
    assert torch.equal(image_transform(removed)(image), expected)


class Own(ImageData):
    """A dataset from outside the package."""

    def read(self):
        return {"train": ImageArrays(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int64))}


def test_a_dataset_from_outside_is_known_once_it_is_imported():
    assert image_transform({"_target_": f"{__name__}.Own", **DIGITS})(
        np.zeros((4, 4), np.uint8)
    ).shape == (1, 8, 8)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "my_package.data.Mine",
        "qat.data.sampler.mix",
        "qat.data.image_transform",
        "Digits",
        5,
    ],
)
def test_code_named_in_a_config_is_not_imported(target):
    with usage_error(rf"^data\._target_='{target}': must be "):
        image_transform({"_target_": target, **DIGITS})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "image of type int: must be a path, a Pillow image, or an array"),
        (torch.zeros(3, 8, 8), "image of type Tensor: must be"),
        (np.zeros((8, 8)), r"image of type float64 array \(8, 8\): must be"),
        (np.zeros((3, 8, 8), np.uint8), r"image of type uint8 array \(3, 8, 8\): must be"),
        (np.zeros((0, 5), np.uint8), r"image of type uint8 array \(0, 5\) cannot be decoded \("),
        (
            Image.new("F", (8, 8)),
            r"image of type Image cannot be decoded \(32 bits per pixel",
        ),
        (Image.open(io.BytesIO(png()[:400])), r"image of type PngImageFile cannot be decoded \("),
        ("/no/such.png", r"/no/such\.png cannot be decoded \(.*No such file"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with usage_error(f"^{message}"):
        image_transform(COLOURS)(image)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"colour": 1}, "data: .* 'colour'"),
        ({"in_chans": 4, "mean": [0.5] * 4, "std": [0.5] * 4}, r"data\.in_chans=4: must be "),
        (
            {"_target_": "qat.data.ImageFolder", "model": "resnet18.nope"},
            r"data\.model='resnet18\.nope': must be ",
        ),
    ],
    ids=["unknown", "channels", "model"],
)
def test_settings_that_cannot_work_are_named(changes, line):
    with usage_error(f"^{line}"):
        image_transform({**COLOURS, **changes})
