"""One image as evaluation sees it. Oracle: the validation loader of the dataset that the image is from, bit for bit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import qat
from qat.data import (
    DataSettings,
    FashionMnist,
    ImageArrays,
    ImageData,
    ImageFolder,
    image_transform,
)
from qat.tasks import build
from tests.conftest import compose
from tests.data.files import GREY, write_fashion_mnist, write_folder

DIGITS = {
    "image_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "mean": [0.25],
    "std": [0.5],
}
COLOURS = {
    "image_size": 8,
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 2,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25, 0.3, 0.2],
}
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
    assert torch.equal(torch.stack([transform(path) for path in paths]), expected)
    assert torch.equal(torch.stack([transform(str(path)) for path in paths]), expected)
    assert torch.equal(torch.stack([transform(Image.open(path)) for path in paths]), expected)
    assert torch.equal(
        torch.stack([transform(np.asarray(Image.open(path))) for path in paths]), expected
    )


@pytest.mark.parametrize("chans", [1, 3])
def test_arrays_of_fashion_mnist(tmp_path, chans):
    images, _ = write_fashion_mnist(tmp_path)["t10k"]
    settings = {
        **COLOURS,
        **RECIPE,
        "num_classes": 4,
        "image_size": 20,
        "in_chans": chans,
        "mean": [0.5] * chans,
        "std": [0.25] * chans,
    }
    data = FashionMnist(**settings, root=str(tmp_path))
    ((expected, _),) = data.test_dataloader()
    assert torch.equal(
        torch.stack([image_transform(data.settings)(image) for image in images]), expected
    )


def png():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


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
    stored, image = build.plain(cfg.data), Image.open(io.BytesIO(png()))
    assert torch.equal(
        image_transform(stored)(image), image_transform(build.build_data(cfg).settings)(image)
    )
    assert stored == build.plain(cfg.data)


def test_a_stored_config_of_a_reader_that_was_removed_is_still_a_transform():
    image = Image.open(io.BytesIO(png()))
    stored = {
        "_target_": "qat.data.Timm",
        **COLOURS,
        "name": "wds/photos",
        "cache": "auto",
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    assert torch.equal(
        image_transform(stored)(image),
        image_transform({**COLOURS, "crop_pct": 0.9, "interpolation": "bicubic"})(image),
    )


def test_plain_settings_do():
    image = Image.open(io.BytesIO(png()))
    assert torch.equal(
        image_transform(COLOURS)(image), image_transform(DataSettings(**COLOURS))(image)
    )


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
    with pytest.raises(
        qat.UsageError,
        match=rf"^data\._target_='{target}': must be a dataset of qat or of an imported module",
    ):
        image_transform({"_target_": target, **DIGITS})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "image of type int: must be a path, Pillow's image, or an array"),
        (torch.zeros(3, 8, 8), "image of type Tensor: must be"),
        (np.zeros((8, 8)), r"image of type float64 array \(8, 8\): must be"),
        (np.zeros((3, 8, 8), np.uint8), r"image of type uint8 array \(3, 8, 8\): must be"),
        (np.zeros((0, 5), np.uint8), r"image of type uint8 array \(0, 5\) cannot be decoded \("),
        (
            Image.new("F", (8, 8)),
            r"image of type Image cannot be decoded \(it has 32 bits per pixel",
        ),
        (Image.open(io.BytesIO(png()[:400])), r"image of type PngImageFile cannot be decoded \("),
        ("/no/such.png", r"/no/such\.png cannot be decoded \(.*No such file"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(qat.UsageError, match=f"^{message}") as caught:
        image_transform(COLOURS)(image)
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_work_are_named():
    with pytest.raises(
        qat.UsageError,
        match=r"data: DataSettings\.__init__\(\) got an unexpected keyword argument 'colour'",
    ):
        image_transform({**COLOURS, "colour": 1})
    with pytest.raises(
        qat.UsageError, match=r"^data\.in_chans=4: must be 1 or 3, the channels of an image$"
    ):
        image_transform({**COLOURS, "in_chans": 4, "mean": [0.5] * 4, "std": [0.5] * 4})
    with pytest.raises(
        qat.UsageError,
        match=r"^data\.model='resnet18\.nope': must be a name of timm's \(Invalid pretrained tag",
    ):
        image_transform({**COLOURS, "_target_": "qat.data.ImageFolder", "model": "resnet18.nope"})
