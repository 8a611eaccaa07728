"""A dataset is a class that reads three splits; everything else about loading images is here."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from qat.data.sampler import Key, ResumableLoader, SeededSampler, isolated_rng, seed_rng
from qat.data.settings import DataSettings
from qat.data.sources import EncodedImages, ImageArrays, ImageSource, hold_out, load
from qat.data.transforms import BatchMixup, Transform, eval_transform, train_transform
from qat.errors import UsageError
from qat.launch.ranks import is_first
from qat.launch.signals import ignore_signals

log = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
# Of files written when there were these settings.
REMOVED = {"cache", "in_memory", "class_weights", "erase_mode", "erase_count", "mixup_mode"}
IMAGENET: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
}


def data_folder(root: str | None, holds: str) -> Path:
    """`data.root` as a path.

    Args:
        root: the setting.
        holds: what a user has to put there, in words.

    Raises:
        UsageError: it is not set, or no folder.
    """
    if not root or not (folder := Path(str(root))).is_dir():
        raise UsageError(f"data.root={root!r}: must be the folder that holds {holds}")
    return folder


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Images after a transform. Every random draw is a function of (seed, epoch, index, copy): worker count and order do not matter."""

    def __init__(self, source: ImageSource, transform: Transform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key | int]) -> list[tuple[Tensor, int]]:
        """All images of a batch: what costs the same for one and for many is done once. Torch's loaders ask for it."""
        images, labels = [], []
        with isolated_rng():
            for key in keys:
                epoch, index, *copy = key if isinstance(key, tuple) else (0, key)
                image, label = self.source[index]
                if self.transform.is_random:
                    seed_rng(self.seed, epoch, index, *copy)
                images.append(self.transform.apply(image))
                labels.append(label)
        finish = self.transform.finish
        return list(
            zip(images if finish is None else finish(torch.stack(images)), labels, strict=True)
        )


class ImageData(LightningDataModule, ABC):
    """Base of all datasets; a subclass implements `read`.

    Args:
        settings: fields of `DataSettings`.

    Attributes:
        tested: the split that an evaluation takes; None = `test`, or `val` where there is no test split.
        evaluates_whole: images that come without splits are all tested, not split for a training.

    Raises:
        UsageError: unknown setting, or a value that cannot work.
    """

    CLASSES: ClassVar[Sequence[str]] = ()
    # Settings that the dataset never reads.
    UNREAD: ClassVar[Sequence[str]] = ()
    SETTINGS: ClassVar[type[DataSettings]] = DataSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = self.complete(settings)
        self.tested: str | None = None
        self.evaluates_whole = False
        self._splits: dict[str, ImageSource] = {}
        try:
            train_transform(self.settings)
        except Exception as error:  # timm and torchvision raise nearly anything; better here than in the middle of an epoch
            found = f"data.rand_augment={self.settings.rand_augment!r}, data.color_jitter={self.settings.color_jitter!r}"
            raise UsageError(
                f"{found}: must be what timm's augmentation takes ({error})"
            ) from error

    @classmethod
    def complete(cls, settings: Mapping[str, Any]) -> DataSettings:
        """The settings of this dataset; a subclass may fill in what is None.

        Raises:
            UsageError: unknown or missing setting, or a value that cannot work.
        """
        try:
            return cls.SETTINGS(**{
                name: value for name, value in settings.items() if name not in REMOVED
            })
        except TypeError as error:
            raise UsageError(f"data: {error}") from error

    @abstractmethod
    def read(self) -> Mapping[str, ImageSource]:
        """Read all images: `train`, `val`, and `test` where there is one. Called once, when first needed."""

    def named_classes(self) -> list[str] | None:
        """Names of the classes in the order of their ids, None where they are not known; no image is read."""
        return list(self.CLASSES) if len(self.CLASSES) == self.settings.num_classes else None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.settings.in_chans, self.settings.image_size, self.settings.image_size

    def split(self, name: str) -> ImageSource:
        """The images of one split; the transforms bring them to the settings' size.

        Raises:
            UsageError: there is no such split, or a label is not a class.
        """
        if name not in self.splits:
            raise UsageError(
                f"data.root={self.settings.root!r}: has no split {name!r}; it has {', '.join(self.splits)}"
            )
        return self._splits[name]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that there are, in the order of `SPLITS`."""
        if not self._splits:
            found = self.read()
            for name, source in found.items():
                self._check(name, source)
            self._splits = dict(found)
        return tuple(name for name in SPLITS if name in self._splits)

    def fingerprints(self) -> dict[str, str]:
        """For each split what tells its images and labels from any others, wherever they lie and however they are held in memory."""
        return {name: self.split(name).fingerprint() for name in self.splits}

    @property
    def evaluation_split(self) -> str:
        """`tested`; without it `test`, or `val` where there is no test split."""
        return self.tested or ("test" if "test" in self.splits else "val")

    def evaluation_facts(self, confusion: Tensor | None = None) -> dict[str, Any]:
        """What an accuracy on `evaluation_split` is compared with: the split, its images, the share in % of its most frequent class.

        Args:
            confusion: (K, K), the evaluated images, by true class along the rows; None = all of the split.
        """
        counts = (
            np.bincount(self.split(self.evaluation_split).labels)
            if confusion is None
            else confusion.sum(1).numpy()
        )
        share = 100 * float(counts.max()) / counts.sum()
        return {
            "split": self.evaluation_split,
            "images": int(counts.sum()),
            "majority_share": round(float(share), 4),
        }

    def _check(self, split: str, source: ImageSource) -> None:
        most = self.settings.num_classes
        wrong = source.labels[(source.labels < 0) | (source.labels >= most)]
        if len(wrong):
            raise UsageError(
                f"data.num_classes={most}: labels must be from 0 to {most - 1}; the {split} split has {wrong.max()}"
            )
        absent = np.setdiff1d(np.arange(most), source.labels)
        if split == "train" and len(absent) and is_first():
            log.warning(
                "data.num_classes=%d: %d without training images, the first is class %d",
                most,
                len(absent),
                absent[0],
            )
        if source.chans != self.settings.in_chans:
            raise UsageError(
                f"data.in_chans={self.settings.in_chans}: must be {source.chans}, the channels of the images"
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented; the last incomplete batch is left out.

        Raises:
            UsageError: there are no train images, or fewer than processes.
        """
        return self._loader("train", shuffle=True)

    def batch_mixup(self) -> BatchMixup | None:
        """What a training step does to its batch; None where both `mixup` and `cutmix` are 0.

        Raises:
            UsageError: batches have an odd number of images.
        """
        # Not in the settings, which a checkpoint holds too: evaluation takes batches of any size.
        if not self.settings.mixes:
            return None
        if self.settings.batch_size % 2:
            raise UsageError(
                f"data.batch_size={self.settings.batch_size}: must be even with data.mixup or data.cutmix"
            )
        return BatchMixup(self.settings)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mix a training batch on its device; Lightning calls this before every step."""
        if (
            self.trainer is None
            or not self.trainer.training
            or (mixup := self.batch_mixup()) is None
        ):
            return batch
        step = (
            self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        )  # of all epochs, a resumed run's earlier ones included
        return mixup(
            *batch, epoch=self.trainer.current_epoch, step=step, rank=self.trainer.global_rank
        )

    def val_dataloader(self) -> DataLoader:
        """The validation split in order."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """`evaluation_split` in order, not augmented."""
        return self._loader(self.evaluation_split, shuffle=False)

    def _transformed(self, split: str, *, augmented: bool = False) -> TransformedImages:
        transform = train_transform if augmented else eval_transform
        return TransformedImages(self.split(split), transform(self.settings), self.settings.seed)

    def sample(self, split: str, count: int | None = None) -> DataLoader:
        """Images of a split under the evaluation transform, spread evenly over it.

        Args:
            split: which.
            count: of images; None, or more than there are = all.
        """
        images = self._transformed(split)
        total = len(images)
        count = min(count or total, total)
        chosen = [i * total // count for i in range(count)]
        return DataLoader(
            Subset(images, chosen),
            batch_size=self.settings.batch_size,
            num_workers=self.settings.workers(count),
        )

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader:
        images = self._transformed(split, augmented=shuffle)
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        if len(images) < world:  # a process without images would leave the others waiting for it
            raise UsageError(
                f"trainer.devices: {world} processes are more than the {len(images)} images of the {split} split"
            )
        # Copies without augmentation would be the same image again.
        repeats = self.settings.repeats if self.settings.augment != "none" else 1
        sampler = SeededSampler(
            len(images),
            seed=self.settings.seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world,
            repeats=repeats,
        )
        workers = self.settings.workers(len(images))
        loader = ResumableLoader if shuffle else DataLoader
        return loader(
            images,
            batch_size=self.settings.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available(),
            drop_last=shuffle and len(sampler) >= self.settings.batch_size,
        )

    def calibration_batches(self, batch_size: int | None = None) -> list[Tensor]:
        """Training images with the evaluation transform, the same for a seed: batches (B, C, H, W) from which scales are made.

        Args:
            batch_size: images of a batch; None = `data.batch_size`.

        Raises:
            UsageError: there are no train images.
        """
        images = self._transformed("train")
        count = min(self.settings.calibration_images, len(images))
        order = torch.randperm(
            len(images), generator=torch.Generator().manual_seed(self.settings.seed)
        )[:count]
        chunks = order.split(batch_size or self.settings.batch_size)
        return [torch.stack([images[int(i)][0] for i in chunk]) for chunk in chunks]


class EncodedImageData(ImageData):
    """Base of datasets of image files: of any size, scaled and cropped as the model's pretrained weights expect it.

    Args:
        settings: fields of `DataSettings`; None in `mean`, `std`, `crop_pct`, `crop_mode` and `interpolation` = that of `model`,
            in `num_classes` = as many as the data have.

    Raises:
        UsageError: a value that cannot work.
    """

    def __init__(self, **settings: Any) -> None:
        is_unset = settings.get("num_classes", 1) is None
        super().__init__(**settings | ({"num_classes": 1} if is_unset else {}))
        if is_unset:
            self.settings = replace(self.settings, num_classes=max(self.count_classes(), 1))

    @classmethod
    def complete(cls, settings: Mapping[str, Any]) -> DataSettings:
        """The settings; what is None of how images are prepared (`IMAGENET`) = that of `model`, else ImageNet's usual values."""
        try:
            config = timm.get_pretrained_cfg(settings["model"]) if settings.get("model") else None
        except Exception as error:
            raise UsageError(
                f"data.model={settings['model']!r}: must be a name of timm's ({error})"
            ) from error
        values = {
            name: getattr(config, name, None) or usual
            for name, usual in IMAGENET.items()
            if settings.get(name) is None
        }
        if settings.get("in_chans") == 1:
            values |= {
                name: [sum(values[name]) / len(values[name])]
                for name in {"mean", "std"} & set(values)
            }
        return super().complete({**settings, **values})

    def read(self) -> dict[str, ImageSource]:
        """All splits that there are; without val a tenth of train is held out."""
        found: dict[str, ImageSource] = {}
        for split, images in hold_out(self.encoded()).items():
            source = load(images, self.settings.memory_mb)
            found[split] = (
                replace(source, known_as=images.fingerprint())
                if isinstance(source, ImageArrays)
                else source
            )
        return found

    @abstractmethod
    def encoded(self) -> Mapping[str, EncodedImages]:
        """The splits as they are stored."""

    def count_classes(self) -> int:
        """How many classes the data have: the highest label of their first split plus one."""
        return int(next(iter(self.encoded().values())).labels.max(initial=-1)) + 1
