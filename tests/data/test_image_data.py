"""Features that all datasets share. Oracles: arrays written here, properties, and loaders with another number of workers."""

from types import SimpleNamespace

import hydra.utils
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from qat.data import Digits, ImageArrays, ImageData, ImageFolder
from qat.model.metadata import is_plain_data
from tests.data.files import DIGITS, write_folder
from tests.errors import usage_error


class Numbered(ImageData):
    """Image i has the value i everywhere, and class i % 10."""

    sizes = {"train": 30, "val": 7}
    shape = (8, 8, 1)
    first_label = 0

    def read(self):
        return {name: self.arrays(n) for name, n in self.sizes.items()}

    def arrays(self, n):
        images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones(
            self.shape, dtype=np.uint8
        )
        return ImageArrays(images, self.first_label + np.arange(n, dtype=np.int64) % 10)


def numbers(batches):
    """Which image of `Numbered` each entry is."""
    return [
        round((image.mean().item() * 0.5 + 0.25) * 255) for images, _ in batches for image in images
    ]


def loaded(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_evaluation_batches_are_the_normalised_images_in_order():
    images, labels = loaded(Numbered(**DIGITS, batch_size=3).val_dataloader())
    assert labels.tolist() == list(range(7))
    expected = (torch.arange(7.0) / 255 - 0.25) / 0.5
    assert_close(images, expected[:, None, None, None].expand(7, 1, 8, 8))


@pytest.mark.parametrize("kind", [Digits, Numbered])
def test_a_config_builds_the_same_dataset(kind):
    config = kind(**DIGITS, batch_size=3).config()
    again = hydra.utils.instantiate(config)
    assert type(again) is kind
    assert again.config() == config
    assert is_plain_data(config)


def test_of_photos_only_the_folder_is_needed(tmp_path):
    root = write_folder(tmp_path, (("train", 20), ("test", 6)), classes=("a", "b", "c"))
    data = ImageFolder(root=str(root))
    assert (data.settings.num_classes, data.input_size) == (3, (3, 224, 224))
    assert data.config()["_target_"] == "qat.data.ImageFolder"
    assert data.config()["mean"] == (0.485, 0.456, 0.406)


def test_the_fingerprint_does_not_depend_on_how_the_folder_is_typed(tmp_path, monkeypatch):
    root = write_folder(tmp_path, (("train", 20),), classes=("a", "b", "c")) / "train"
    monkeypatch.chdir(root)
    assert ImageFolder(root=".").fingerprints() == ImageFolder(root=str(root)).fingerprints()


def test_without_a_test_split_validation_is_evaluated():
    data = Numbered(**DIGITS)
    assert data.evaluation_split == "val"
    assert numbers(data.test_dataloader()) == list(range(7))
    with usage_error(r"^data\.root=None: has no split 'test'"):
        data.split("test")


def test_every_process_needs_an_image():
    data = Numbered(**DIGITS)
    data.share_images(SimpleNamespace(global_rank=0, world_size=8))
    with usage_error(r"^trainer\.devices: 8 .* the 7 images of the val"):
        data.val_dataloader()


def test_training_leaves_out_the_last_incomplete_batch():
    loader = Numbered(**DIGITS, batch_size=8).train_dataloader()
    assert [len(target) for _, target in loader] == [8, 8, 8]
    assert len(loader) == 3


@pytest.mark.sample(1)
@pytest.mark.parametrize("augment", ["none", "light", "timm"])
def test_worker_processes_change_neither_order_nor_augmentation(augment):
    def epoch(workers):
        return loaded(
            Digits(
                **DIGITS, augment=augment, batch_size=100, num_workers=workers
            ).train_dataloader(),
            epoch=3,
        )

    (images, labels), (images_2, labels_2) = epoch(0), epoch(2)
    assert torch.equal(labels, labels_2)
    assert torch.equal(images, images_2)


@pytest.mark.parametrize("augment", ["light", "timm"])
def test_augmentation_is_a_function_of_seed_epoch_and_image(augment):
    def images(augment, seed, epoch, order=range(20)):
        dataset = Digits(**DIGITS, augment=augment, seed=seed).train_dataloader().dataset
        return torch.stack([dataset[epoch, i][0] for i in order])

    first = images(augment, 0, 1)
    assert torch.equal(images(augment, 0, 1, order=range(19, -1, -1)).flip(0), first)
    for other in (("none", 0, 1), (augment, 0, 2), (augment, 1, 1)):
        assert not torch.equal(images(*other), first)


def test_deviates_from_reference_scales_come_from_images_without_augmentation():
    # There one augmented training batch makes the scales.
    def batches(**settings):
        return Numbered(
            **DIGITS, calibration_images=20, batch_size=8, **settings
        ).calibration_batches()

    first = batches(seed=1)
    assert [tuple(b.shape) for b in first] == [(8, 1, 8, 8), (8, 1, 8, 8), (4, 1, 8, 8)]
    chosen = [round((image.mean().item() * 0.5 + 0.25) * 255) for image in torch.cat(first)]
    assert len(set(chosen)) == 20
    assert max(chosen) > 7
    for again in (batches(seed=1), batches(seed=1, augment="timm"), batches(seed=1, num_workers=2)):
        assert torch.equal(torch.cat(again), torch.cat(first))
    assert not torch.equal(torch.cat(batches(seed=2)), torch.cat(first))


def test_images_are_resized():
    data = Digits(**{**DIGITS, "image_size": 12})
    small = data.split("val").images[3, :, :, 0]
    expected = np.asarray(Image.fromarray(small).resize((12, 12), Image.Resampling.BICUBIC))
    images, _ = loaded(data.val_dataloader())
    assert_close(images[3, 0], (torch.from_numpy(expected / 255).float() - 0.25) / 0.5)
    assert data.calibration_batches()[0].shape[1:] == (1, 12, 12)


@pytest.mark.parametrize("augment", ["light", "timm"])
def test_each_copy_of_an_image_has_its_own_augmentation(augment):
    data = Digits(**DIGITS, augment=augment, repeats=3, batch_size=30)
    images, labels = loaded(data.train_dataloader(), epoch=1)
    assert len(labels) == 1257 // 30 * 30
    copies, classes = images.unflatten(0, (-1, 3)), labels.unflatten(0, (-1, 3))
    assert (classes == classes[:, :1]).all()
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (copies[:, first] != copies[:, second]).flatten(1).any(1).float().mean() > 0.9
    dataset = data.train_dataloader().dataset
    assert torch.equal(dataset[1, 5, 2][0], dataset[1, 5, 2][0])
    # The first copy is the image as an epoch without repeats has it.
    assert torch.equal(dataset[1, 5, 0][0], dataset[1, 5][0])


def test_repeats_without_augmentation_would_be_the_same_image_again():
    loader = Numbered(**DIGITS, augment="none", repeats=3, batch_size=10).train_dataloader()
    assert sorted(numbers(loader)) == list(range(30))


@pytest.mark.parametrize(
    ("first", "classes", "label"), [(0, 9, 9), (-1, 10, -1)]
)  # Hugging Face marks unpublished labels by -1
def test_a_label_that_is_no_class_is_refused(first, classes, label):
    data = Numbered(**{**DIGITS, "num_classes": classes})
    data.first_label = first
    with usage_error(rf"^data\.num_classes={classes}: .*train.* {label}$"):
        data.train_dataloader()


def test_images_with_another_number_of_channels_are_refused():
    data = Numbered(**DIGITS)
    data.shape = (8, 8, 3)
    with usage_error(r"^data\.in_chans=1: must be 3"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("classes", "lines"),
    [
        (10, []),
        (
            12,
            [
                "data.num_classes=12: no training images for 2 of these classes; the first is class 10"
            ],
        ),
    ],
)
def test_classes_without_training_images_are_named(caplog, classes, lines):
    data = Digits(**{**DIGITS, "num_classes": classes})
    assert data.splits == ("train", "val", "test")
    assert caplog.messages == lines
