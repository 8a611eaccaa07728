"""A dataset is a class that reads three splits; everything else about loading images is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data.sampler import Key, SeededSampler, isolated_rng
from qat.data.transforms import AUGMENTATIONS, Transform, eval_transform, train_transform
from qat.errors import UsageError
from qat.spec import check_choice, check_whole

SPLITS = ("train", "val", "test")
# One fixed division into train, val and test: results of different runs and seeds are on the same images.
SPLIT_SEED = 0


@dataclass(frozen=True)
class DataSettings:
    """The knobs of `data/*.yaml`.

    Attributes:
        image_size: height and width in pixels; images of another size are resized when read.
        patch_size: patch of the model for images of this size; None = the model's own.
        in_chans: colour channels.
        num_classes: number of classes.
        mean: per channel, of pixel values in [0, 1].
        std: likewise.
        batch_size: images per process and step.
        num_workers: loader processes.
        augment: `none`, `light` (shifted crop, flip) or `timm` (RandAugment, random erasing).
        hflip: probability of a horizontal flip under `light` and `timm`; 0 where left and right matter.
        calibration_images: images from which scales are initialised.
        seed: of order, augmentation and calibration images.
        root: folder with the data.
    """

    image_size: int
    patch_size: int | None
    in_chans: int
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int = 64
    num_workers: int = 0
    augment: str = "none"
    hflip: float = 0.5
    calibration_images: int = 256
    seed: int = 0
    root: str | None = None

    def __post_init__(self) -> None:
        check_choice("data.augment", self.augment, AUGMENTATIONS)
        lowest = {"image_size": 1, "in_chans": 1, "num_classes": 1, "batch_size": 1, "num_workers": 0, "calibration_images": 1}
        for name, bound in lowest.items():
            check_whole(f"data.{name}", getattr(self, name), bound)
        if not 0 <= self.hflip <= 1:
            raise UsageError(f"data.hflip={self.hflip!r}: allowed are numbers from 0 to 1")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.in_chans:
                raise UsageError(f"data.{name}={list(getattr(self, name))}: needs one number for each of the {self.in_chans} channels")


@dataclass(frozen=True)
class ImageArrays:
    """Decoded images in memory.

    Attributes:
        images: (N, H, W, C), uint8.
        labels: (N,), class ids.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])

    def take(self, indices: NDArray[np.int64]) -> ImageArrays:
        """The images at `indices`."""
        return ImageArrays(self.images[indices], self.labels[indices])

    def resized(self, size: int) -> ImageArrays:
        """All images as `size` x `size` pixels, bicubic; itself if they are."""
        if self.images.shape[1:3] == (size, size):
            return self
        chans = self.images.shape[3]
        pil = (Image.fromarray(image[:, :, 0] if chans == 1 else image) for image in self.images)
        arrays = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, chans) for image in pil]
        return ImageArrays(np.stack(arrays), self.labels)


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Images behind a transform. Every random draw is a function of (seed, epoch, index): worker count and order do not matter."""

    def __init__(self, source: ImageArrays, transform: Transform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.source[index]
        if not self.transform.is_random:
            return self.transform(image), label
        with isolated_rng(self.seed, epoch, index):
            return self.transform(image), label


class ImageData(LightningDataModule, ABC):
    """Base of all datasets; a subclass implements `read`.

    Args:
        settings: fields of `DataSettings`.

    Raises:
        UsageError: unknown setting, or a value that cannot work.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        try:
            self.settings = DataSettings(**settings)
        except TypeError as error:
            raise UsageError(f"data: {str(error).replace('DataSettings.__init__() ', '')}") from error
        self._splits: dict[str, ImageArrays] = {}

    @abstractmethod
    def read(self) -> dict[str, ImageArrays]:
        """Read all images: `train`, `val`, and `test` where there is one. Called once, when first needed."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.settings.in_chans, self.settings.image_size, self.settings.image_size

    def split(self, name: str) -> ImageArrays:
        """The images of one split, at the settings' size.

        Raises:
            UsageError: there is no such split, or a label is not a class.
        """
        if not self._splits:
            self._splits = {k: self._checked(k, v).resized(self.settings.image_size) for k, v in self.read().items()}
        if name not in self._splits:
            raise UsageError(f"data: {type(self).__name__} has no split {name!r}; it has {', '.join(self._splits)}")
        return self._splits[name]

    @property
    def evaluation_split(self) -> str:
        """`test`, or `val` where there is no test split."""
        self.split("train")
        return "test" if "test" in self._splits else "val"

    def _checked(self, name: str, arrays: ImageArrays) -> ImageArrays:
        wrong = arrays.labels[(arrays.labels < 0) | (arrays.labels >= self.settings.num_classes)]
        if len(wrong):
            raise UsageError(f"data.num_classes={self.settings.num_classes}: the {name} split has a label {wrong.max()}")
        if arrays.images.shape[3] != self.settings.in_chans:
            raise UsageError(f"data.in_chans={self.settings.in_chans}: the images have {arrays.images.shape[3]} channels")
        return arrays

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented; the last incomplete batch is left out."""
        images = TransformedImages(self.split("train"), train_transform(self.settings), self.settings.seed)
        return self._loader(images, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The validation split in order."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        """The test split in order, or validation where there is none."""
        return self._evaluation_loader(self.evaluation_split)

    def _evaluation_loader(self, split: str) -> DataLoader:
        return self._loader(TransformedImages(self.split(split), eval_transform(self.settings), self.settings.seed), shuffle=False)

    def _loader(self, images: TransformedImages, *, shuffle: bool) -> DataLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = SeededSampler(len(images), seed=self.settings.seed, shuffle=shuffle, rank=rank, world_size=world)
        workers = self.settings.num_workers
        return DataLoader(
            images,
            batch_size=self.settings.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            drop_last=shuffle and len(sampler) >= self.settings.batch_size,
        )

    def calibration_batches(self) -> list[Tensor]:
        """Training images with the evaluation transform, the same for a seed: batches (B, C, H, W) from which scales are made."""
        images = TransformedImages(self.split("train"), eval_transform(self.settings), self.settings.seed)
        count = min(self.settings.calibration_images, len(images))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.settings.seed))[:count]
        return [torch.stack([images[int(i)][0] for i in chunk]) for chunk in order.split(self.settings.batch_size)]


def stratified_split(labels: NDArray[np.int64], held_out: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the kept and the held-out images, class shares equal, always the same for the same labels."""
    kept, out = train_test_split(np.arange(len(labels)), test_size=held_out, random_state=SPLIT_SEED, stratify=labels)
    return np.sort(kept), np.sort(out)
