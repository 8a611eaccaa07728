"""Datasets that timm reads by index: folders, tar files, torchvision and Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import timm.data
from PIL import Image

from qat.data.image_data import SPLITS, EncodedImageData, data_folder
from qat.data.settings import DataSettings
from qat.data.sources import EncodedImages, digest, open_file, open_image
from qat.errors import UsageError
from qat.utils.text import MAX_FILE_BYTES
from qat.utils.validate import check_bool


@dataclass(frozen=True)
class TimmSettings(DataSettings):
    """The settings of `data/timm.yaml`.

    timm's `input_key` and `target_key` are `image_column` and `label_column`.

    Attributes:
        name: name of the dataset in timm, `torch/NAME` or `hfds/NAME`; empty = a folder or a tar
            file.
        train_split: name of the training split; None = evaluation only.
        val_split: name of the validation split, which selects checkpoints; None = a fixed tenth of
            train is held out.
        test_split: name of the split for the final evaluation; None = the validation split.
        download: True = download torchvision's datasets.

    Raises:
        UsageError: a setting is invalid, or no split is named.
    """

    name: str = ""
    train_split: str | None = "train"
    val_split: str | None = "validation"
    test_split: str | None = None
    download: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("data.download", self.download)
        for column in ("image_column", "label_column"):
            value = getattr(self, column)
            if value is not None and not str(self.name).startswith("hfds/"):
                raise UsageError(
                    f"data.{column}={value!r}: with data=timm, works only for data.name=hfds/NAME"
                )
        if self.train_split is None and self.val_split is None and self.test_split is None:
            raise UsageError(
                "data.train_split, data.val_split and data.test_split are null: "
                "one must be the name of a split"
            )


class TimmImages(EncodedImages):
    """One split of a dataset that timm reads.

    Args:
        settings: settings of the dataset.
        split: timm's name of the split.

    Raises:
        UsageError: timm cannot read the split, or its labels are not integers.
    """

    def __init__(self, settings: TimmSettings, split: str) -> None:
        options: dict[str, Any] = {}
        if str(settings.name).startswith("hfds/"):
            options = {"input_key": settings.image_column, "target_key": settings.label_column}
        elif str(settings.root).endswith(".tar"):
            # With this cache, worker processes would share one open file and its position.
            options = {"cache_tarfiles": False}
        else:
            data_folder(settings.root, "the dataset, or the path of a tar file")  # only a check
        try:
            root = None if settings.root is None else str(settings.root)
            dataset = timm.data.create_dataset(
                settings.name, root=root, split=split, download=settings.download, **options
            )
            reader = getattr(dataset, "reader", dataset)
            targets = _read_labels(reader)
            # torchvision's own loader would open all of Pillow's formats.
            if hasattr(reader, "loader"):
                reader.loader = open_file
            labels = np.asarray(targets).astype(np.int64, casting="safe")
        except Exception as error:  # timm, torchvision and `datasets` may raise any exception
            raise UsageError(
                f"data.name={settings.name!r}: must be a dataset that timm can read; "
                f"for split {split!r} timm reports: {type(error).__name__}: {error}"
            ) from error
        super().__init__(labels, f"data.name={settings.name!r}, {split!r}", settings)
        self.reader = reader
        # Paths, to find files that two splits share; unknown for datasets that have a name.
        self.files: set[str] = set()
        if not settings.name:
            self.files = set(reader.filenames(absolute=True))
        self.classes: dict[str, int] = getattr(reader, "class_to_idx", {})

    def open(self, index: int) -> Image.Image:
        """Open one image; files are limited to `MAX_FILE_BYTES` bytes."""
        row = int(self.rows[index])
        samples = getattr(self.reader, "samples", None)
        if samples is not None:
            path = samples[row][0]
            if isinstance(path, str):
                return open_file(path)
        image_or_file = self.reader[row][0]
        if isinstance(image_or_file, Image.Image):
            return image_or_file
        with image_or_file:
            return open_image(image_or_file.read(MAX_FILE_BYTES))

    def name(self, index: int) -> str:
        """Name of the split, and number of the image."""
        return f"{self.origin}: image {self.rows[index]}"

    def fingerprint(self) -> str:
        """Hash of dataset and split names, labels and rows, but not of the contents of files."""
        return digest(self.labels, self.origin.encode(), self.row_bytes())


def _read_labels(reader: Any) -> Any:
    """Labels of all images of a timm reader or a dataset."""
    if hasattr(reader, "iter_targets"):
        return list(reader.iter_targets())
    targets = getattr(reader, "targets", None)
    if targets is not None:
        return targets
    return [label for _, label in reader.samples]


class Timm(EncodedImageData):
    """A dataset that timm reads, in the order of timm's reader."""

    SETTINGS: ClassVar[type[DataSettings]] = TimmSettings
    settings: TimmSettings

    def encoded(self) -> Mapping[str, EncodedImages]:
        """The splits that the settings name.

        Raises:
            UsageError: a split cannot be read, shares files with another split, or has a class that
                the first split does not have; or a split is a slice of another.
        """
        return self._images_by_split

    @cached_property
    def _images_by_split(self) -> dict[str, TimmImages]:
        splits: dict[str, TimmImages] = {}
        for split in SPLITS:
            name = getattr(self.settings, f"{split}_split")
            if name is None:
                continue
            setting = f"data.{split}_split={name!r}"
            images = TimmImages(self.settings, name)
            for other_split, other_images in splits.items():
                other_name = getattr(self.settings, f"{other_split}_split")
                if _contains_slice(str(name), str(other_name)):
                    raise UsageError(
                        f"{setting}: overlaps with data.{other_split}_split={other_name!r}; "
                        "slices must not overlap, such as train[:90%] and train[90%:]"
                    )
                if images.files & other_images.files:
                    raise UsageError(
                        f"{setting}: shares files with the {other_split} split; "
                        f"must have other files, or be null if there is no {split} split"
                    )
            if splits:
                first_split = next(iter(splits))
                _renumber_labels(splits[first_split], images, setting, first_split)
            splits[split] = images
        return splits

    def named_classes(self) -> list[str] | None:
        """Return the reader's class names, or None if unknown or not as many as `num_classes`."""
        if self.settings.root is None and not str(self.settings.name).startswith("hfds/"):
            return None
        classes = next(iter(self._images_by_split.values())).classes
        if len(classes) != self.settings.num_classes:
            return None
        return sorted(classes, key=classes.__getitem__)


def _contains_slice(name: str, other_name: str) -> bool:
    """True if one split is a slice of the other, as `train[90%:]` is of `train`."""
    return name.startswith(f"{other_name}[") or other_name.startswith(f"{name}[")


def _renumber_labels(
    first_images: TimmImages, images: TimmImages, setting: str, first_split: str
) -> None:
    """Replace the class ids of a split by the class ids of the first split.

    Raises:
        UsageError: the split has a class that the first split does not have.
    """
    if images.classes == first_images.classes:
        return
    unknown = sorted(images.classes.keys() - first_images.classes.keys())
    if unknown:
        raise UsageError(
            f"{setting}: class {unknown[0]!r} is not in the {first_split} split; "
            "must have only classes of that split"
        )
    names = {class_id: name for name, class_id in images.classes.items()}
    images.labels = np.array([
        first_images.classes[names[label]] for label in images.labels.tolist()
    ])
