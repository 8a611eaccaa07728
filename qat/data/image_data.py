"""Base classes of datasets: a subclass reads the splits, the base class does everything else."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from qat.data.sampler import ImageKey, ResumableLoader, SeededSampler, isolated_rng, seed_rng
from qat.data.settings import DataSettings
from qat.data.sources import EncodedImages, ImageArrays, ImageSource, load
from qat.data.splits import hold_out
from qat.data.transforms import BatchMixup, Transform, eval_transform, train_transform
from qat.errors import UsageError
from qat.launch.ranks import is_first
from qat.launch.signals import ignore_signals

log = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
# Settings of earlier versions. They are ignored, because old checkpoints contain them.
REMOVED_SETTINGS = {
    "cache",
    "in_memory",
    "class_weights",
    "erase_mode",
    "erase_count",
    "mixup_mode",
}
IMAGENET_PREPROCESSING: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
}


def data_folder(root: str | None, content: str) -> Path:
    """`data.root` as a path.

    Args:
        root: the setting.
        content: the files that the folder must contain, for error messages.

    Raises:
        UsageError: the setting is empty, or the path is not a folder.
    """
    if not root or not Path(str(root)).is_dir():
        raise UsageError(f"data.root={root!r}: must be the folder that contains {content}")
    return Path(str(root))


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Images (C, H, W) of a source, transformed when they are read, with their class ids.

    Every random draw depends only on (seed, epoch, index, copy), not on the order of reading or on
    the number of workers.
    """

    def __init__(self, source: ImageSource, transform: Transform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: ImageKey | int) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[ImageKey | int]) -> list[tuple[Tensor, int]]:
        """Images and class ids of a batch; `Transform.finish` runs on the whole batch.

        torch's loaders call this method.
        """
        images: Any = []
        labels = []
        with isolated_rng():
            for key in keys:
                epoch, index, *copy = key if isinstance(key, tuple) else (0, key)
                image, label = self.source[index]
                if self.transform.is_random:
                    seed_rng(self.seed, epoch, index, *copy)
                images.append(self.transform.apply(image))
                labels.append(label)
        if self.transform.finish is not None:
            images = self.transform.finish(torch.stack(images))
        return list(zip(images, labels, strict=True))


class ImageData(LightningDataModule, ABC):
    """Base of all datasets; a subclass implements `read`.

    Args:
        settings: fields of `DataSettings`. If a field is left out, the value in the `DEFAULTS` of
            the class is used, or else the default of `DataSettings`.

    Attributes:
        requested_split: the split for evaluation; None = `test`, or `val` if the data have no test
            split.
        evaluates_whole: only for data without splits. True = use all images for testing; False =
            use them for training, and hold out a part.

    Raises:
        UsageError: a setting is unknown, missing or invalid.
    """

    CLASSES: ClassVar[Sequence[str]] = ()
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    # Settings that the dataset never reads.
    UNREAD: ClassVar[Sequence[str]] = ()
    SETTINGS: ClassVar[type[DataSettings]] = DataSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = self.complete({**self.DEFAULTS, **settings})
        self.requested_split: str | None = None
        self.evaluates_whole = False
        self._splits: dict[str, ImageSource] = {}
        try:
            train_transform(self.settings)
        # timm and torchvision may raise any exception; report it here, not in the first epoch.
        except Exception as error:
            raise UsageError(
                f"data.rand_augment={self.settings.rand_augment!r}, "
                f"data.color_jitter={self.settings.color_jitter!r}: "
                f"must be values that timm's augmentation accepts ({error})"
            ) from error

    @classmethod
    def complete(cls, settings: Mapping[str, Any]) -> DataSettings:
        """Check settings, ignoring `REMOVED_SETTINGS`; a subclass may fill in values that are None.

        Raises:
            UsageError: a setting is unknown or missing, or has an invalid value.
        """
        current_settings = {
            name: value for name, value in settings.items() if name not in REMOVED_SETTINGS
        }
        try:
            return cls.SETTINGS(**current_settings)
        except TypeError as error:
            raise UsageError(f"data: {error}") from error

    @abstractmethod
    def read(self) -> Mapping[str, ImageSource]:
        """Read the existing splits among `train`, `val` and `test`.

        The base class calls this method once, when it needs the images.
        """

    def named_classes(self) -> list[str] | None:
        """Return class names in the order of class ids, or None if unknown; read no image."""
        if len(self.CLASSES) != self.settings.num_classes:
            return None
        return list(self.CLASSES)

    def config(self) -> dict[str, Any]:
        """Class and settings as plain data, as checkpoints store them."""
        dataset_class = type(self)
        package = dataset_class.__module__
        if package.startswith("qat.data."):
            package = "qat.data"
        return {"_target_": f"{package}.{dataset_class.__qualname__}", **asdict(self.settings)}

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size of the images for a model: (channels, height, width)."""
        return self.settings.in_chans, self.settings.image_size, self.settings.image_size

    def split(self, name: str) -> ImageSource:
        """Images of one split, in their original size.

        Raises:
            UsageError: there is no such split, the data cannot be read, or labels or channels
                contradict the settings.
        """
        if name not in self.splits:
            raise UsageError(
                f"data.root={self.settings.root!r}: has no split {name!r}; "
                f"it has {', '.join(self.splits)}"
            )
        return self._splits[name]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the existing splits, in the order of `SPLITS`."""
        if not self._splits:
            splits = self.read()
            for name, source in splits.items():
                self._check_split(name, source)
            self._splits = dict(splits)
        return tuple(name for name in SPLITS if name in self._splits)

    def fingerprints(self) -> dict[str, str]:
        """Hash of each split, by which changed data are recognized.

        The hash does not depend on `data.root` or, for image files, on their contents
        (`EncodedImages.fingerprint`).
        """
        return {name: self.split(name).fingerprint() for name in self.splits}

    @property
    def evaluation_split(self) -> str:
        """`requested_split` if it is set; else `test`, or `val` if there is no test split."""
        if self.requested_split:
            return self.requested_split
        return "test" if "test" in self.splits else "val"

    def evaluation_facts(self, confusion: Tensor | None = None) -> dict[str, Any]:
        """Split, number of images and percentage of the most frequent class, to judge an accuracy.

        Args:
            confusion: (K, K), number of evaluated images by true class (row) and predicted class
                (column); None = count all images of the split.

        Returns:
            `split`, `images`, and `majority_share`, the percentage of images in the most frequent
            class.
        """
        if confusion is None:
            labels = self.split(self.evaluation_split).labels
            counts = np.bincount(labels)
        else:
            counts = confusion.sum(1).numpy()
        majority_percent = float(100 * counts.max() / counts.sum())
        return {
            "split": self.evaluation_split,
            "images": int(counts.sum()),
            "majority_share": round(majority_percent, 4),
        }

    def _check_split(self, split: str, source: ImageSource) -> None:
        """Check labels and channels of a split, and warn of classes without training images."""
        num_classes = self.settings.num_classes
        invalid_labels = source.labels[(source.labels < 0) | (source.labels >= num_classes)]
        if len(invalid_labels):
            raise UsageError(
                f"data.num_classes={num_classes}: labels must be from 0 to {num_classes - 1}; "
                f"the {split} split has {invalid_labels.max()}"
            )
        missing_classes = np.setdiff1d(np.arange(num_classes), source.labels)
        if split == "train" and len(missing_classes) and is_first():
            log.warning(
                "data.num_classes=%d: no training images for %d of these classes; "
                "the first is class %d",
                num_classes,
                len(missing_classes),
                missing_classes[0],
            )
        if source.chans != self.settings.in_chans:
            raise UsageError(
                f"data.in_chans={self.settings.in_chans}: "
                f"must be {source.chans}, the channels of the images"
            )

    def share_images(self, trainer: Trainer) -> None:
        """Divide the images among the processes of a trainer from now on."""
        self.trainer = trainer

    def train_dataloader(self) -> DataLoader:
        """Loader of training images, shuffled, with augmentation as set.

        An incomplete last batch is left out, unless it is the only batch.

        Raises:
            UsageError: there are no training images, or fewer images than processes.
        """
        return self._loader("train", shuffle=True)

    def batch_mixup(self) -> BatchMixup | None:
        """Return mixup and CutMix for training batches, or None if both are off.

        Raises:
            UsageError: `data.batch_size` is odd.
        """
        if not self.settings.mixes:
            return None
        # The settings cannot check this, because an evaluation may use any batch size.
        if self.settings.batch_size % 2:
            raise UsageError(
                f"data.batch_size={self.settings.batch_size}: "
                "must be even with data.mixup or data.cutmix"
            )
        return BatchMixup(self.settings)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mix a training batch on its device; Lightning calls this method for every batch."""
        if self.trainer is None or not self.trainer.training:
            return batch
        mixup = self.batch_mixup()
        if mixup is None:
            return batch
        # Batches are counted over all epochs, including epochs before the run was resumed.
        step = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        return mixup(
            *batch, epoch=self.trainer.current_epoch, step=step, rank=self.trainer.global_rank
        )

    def val_dataloader(self) -> DataLoader:
        """Loader of the validation split, in order and not augmented."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """Loader of `evaluation_split`, in order and not augmented."""
        return self._loader(self.evaluation_split, shuffle=False)

    def _transformed_images(self, split: str, *, augmented: bool = False) -> TransformedImages:
        transform = train_transform if augmented else eval_transform
        return TransformedImages(self.split(split), transform(self.settings), self.settings.seed)

    def sample(self, split: str, count: int | None = None) -> DataLoader:
        """Loader of images spread evenly over a split, with the evaluation transform.

        Args:
            split: name of the split.
            count: number of images; None, or more than the split has = all images.
        """
        images = self._transformed_images(split)
        num_images = len(images)
        count = min(count or num_images, num_images)
        sampled_indices = [i * num_images // count for i in range(count)]
        return DataLoader(
            Subset(images, sampled_indices),
            batch_size=self.settings.batch_size,
            num_workers=self.settings.workers(count),
        )

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader:
        images = self._transformed_images(split, augmented=shuffle)
        rank = 0
        world_size = 1
        if self.trainer:
            rank = self.trainer.global_rank
            world_size = self.trainer.world_size
        # A process without images would make the other processes wait for ever.
        if len(images) < world_size:
            raise UsageError(
                f"trainer.devices: {world_size} processes are more than "
                f"the {len(images)} images of the {split} split; use fewer"
            )
        # Without augmentation, all copies of an image would be equal, so each image appears once.
        repeats = self.settings.repeats if self.settings.augment != "none" else 1
        sampler = SeededSampler(
            len(images),
            seed=self.settings.seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            repeats=repeats,
        )
        workers = self.settings.workers(len(images))
        loader_class = ResumableLoader if shuffle else DataLoader
        return loader_class(
            images,
            batch_size=self.settings.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            # In a script that iterates the loader itself, the workers must end with the script.
            worker_init_fn=ignore_signals if self.trainer else None,
            pin_memory=torch.cuda.is_available(),
            drop_last=shuffle and len(sampler) >= self.settings.batch_size,
        )

    def calibration_batches(self, batch_size: int | None = None) -> list[Tensor]:
        """`data.calibration_images` training images, or all if fewer, drawn by the seed.

        Args:
            batch_size: images per batch; None = `data.batch_size`.

        Returns:
            Batches (B, C, H, W) of training images with the evaluation transform.

        Raises:
            UsageError: there are no training images.
        """
        images = self._transformed_images("train")
        generator = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(len(images), generator=generator)
        sampled_indices = order[: self.settings.calibration_images]
        batches = []
        for indices in sampled_indices.split(batch_size or self.settings.batch_size):
            batches.append(torch.stack([images[int(index)][0] for index in indices]))
        return batches


class EncodedImageData(ImageData):
    """Base class for datasets of image files of any size, preprocessed for a pretrained model.

    Args:
        settings: fields of `DataSettings`, by default for colour images of 224 x 224 pixels. If
            `mean`, `std`, `crop_pct`, `crop_mode` or `interpolation` is None, the value of `model`
            is used, or else of ImageNet. If `num_classes` is None, classes are counted in the data.

    Raises:
        UsageError: a setting is unknown or invalid, or the data cannot be read to count classes.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "image_size": 224,
        "patch_size": None,
        "in_chans": 3,
        "mean": None,
        "std": None,
    }

    def __init__(self, **settings: Any) -> None:
        counts_classes = settings.get("num_classes") is None
        if counts_classes:
            settings["num_classes"] = 1  # a placeholder: counting needs the other settings
        super().__init__(**settings)
        if counts_classes:
            self.settings = replace(self.settings, num_classes=max(self.count_classes(), 1))

    @classmethod
    def complete(cls, settings: Mapping[str, Any]) -> DataSettings:
        """Fill in preprocessing settings that are None: values of `model`, or else of ImageNet.

        For one channel, `mean` and `std` from these sources are averages over the colours.

        Raises:
            UsageError: a setting is unknown or missing, or has an invalid value.
        """
        config = None
        model = settings.get("model")
        try:
            if model:
                # A user's own model may be registered without a config.
                config = timm.get_pretrained_cfg(model, allow_unregistered=timm.is_model(model))
        except Exception as error:
            raise UsageError(
                f"data.model={model!r}: must be the name of a timm model ({error})"
            ) from error
        preprocessing = {}
        for name, default in IMAGENET_PREPROCESSING.items():
            if settings.get(name) is None:
                preprocessing[name] = getattr(config, name, None) or default
        if settings.get("in_chans") == 1:
            for name in {"mean", "std"} & preprocessing.keys():
                channels = preprocessing[name]
                preprocessing[name] = [sum(channels) / len(channels)]
        return super().complete({**settings, **preprocessing})

    def read(self) -> dict[str, ImageSource]:
        """Read all existing splits; if val is missing, hold out a tenth of train."""
        splits: dict[str, ImageSource] = {}
        for split, images in hold_out(self.encoded()).items():
            source = load(images, self.settings.memory_mb)
            if isinstance(source, ImageArrays):
                source = replace(source, file_fingerprint=images.fingerprint())
            splits[split] = source
        return splits

    @abstractmethod
    def encoded(self) -> Mapping[str, EncodedImages]:
        """The splits, with encoded images."""

    def count_classes(self) -> int:
        """Number of classes in the data: the highest label of the first split plus one."""
        first_split = next(iter(self.encoded().values()))
        return int(first_split.labels.max(initial=-1)) + 1
