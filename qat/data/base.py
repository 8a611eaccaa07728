"""A dataset is a class that reads three splits; everything else about loading images is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data.arrays import ImageSource
from qat.data.loader import ResumableLoader
from qat.data.sampler import Key, SeededSampler, isolated_rng
from qat.data.settings import DataSettings
from qat.data.transforms import Transform, eval_transform, train_transform
from qat.errors import UsageError


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Images behind a transform. Every random draw is a function of (seed, epoch, index): worker count and order do not matter."""

    def __init__(self, source: ImageSource, transform: Transform, seed: int) -> None:
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
        self._splits: dict[str, ImageSource] = {}

    @abstractmethod
    def read(self) -> Mapping[str, ImageSource]:
        """Read all images: `train`, `val`, and `test` where there is one. Called once, when first needed."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.settings.in_chans, self.settings.image_size, self.settings.image_size

    def split(self, name: str) -> ImageSource:
        """The images of one split, at the settings' size.

        Raises:
            UsageError: there is no such split, or a label is not a class.
        """
        if not self._splits:
            self._splits = {name: self._prepared(name, source) for name, source in self.read().items()}
        if name not in self._splits:
            raise UsageError(f"data: {type(self).__name__} has no split {name!r}; it has {', '.join(self._splits)}")
        return self._splits[name]

    @property
    def evaluation_split(self) -> str:
        """`test`, or `val` where there is no test split."""
        self.split("train")
        return "test" if "test" in self._splits else "val"

    def _prepared(self, split: str, source: ImageSource) -> ImageSource:
        wrong = source.labels[(source.labels < 0) | (source.labels >= self.settings.num_classes)]
        if len(wrong):
            raise UsageError(f"data.num_classes={self.settings.num_classes}: the {split} split has a label {wrong.max()}")
        if source.chans != self.settings.in_chans:
            raise UsageError(f"data.in_chans={self.settings.in_chans}: the images have {source.chans} channels")
        # What will be cropped is scaled after the crop.
        return source if self.settings.crop_pct is not None else source.resized(self.settings.image_size)

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
        loader = ResumableLoader if shuffle else DataLoader
        return loader(
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
