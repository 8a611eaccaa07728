"""What timm's dataset factory reads by index: folders, tar files, datasets of torchvision and of Hugging Face."""

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
from qat.utils.text import MOST_READ
from qat.utils.validate import check_bool


@dataclass(frozen=True)
class TimmSettings(DataSettings):
    """The knobs of `data/timm.yaml`; `image_column` and `label_column` are timm's `input_key` and `target_key`.

    Attributes:
        name: of the dataset in timm, `torch/NAME` or `hfds/NAME`; empty = a folder or a tar file.
        train_split: name of the split that a net learns from; None = there is none.
        val_split: name of the split that chooses among checkpoints; None = a tenth of train is held out, always the same images.
        test_split: name of the split that is evaluated in the end; None = val is.
        download: whether datasets of torchvision are downloaded.
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
                    f"data.{column}={value!r}: data=timm reads it only with data.name=hfds/NAME"
                )
        if self.train_split is self.val_split is self.test_split is None:
            raise UsageError(
                "data.train_split, data.val_split and data.test_split are null: one must be the name of a split"
            )


class TimmImages(EncodedImages):
    """One split as timm reads it.

    Args:
        settings: name, root, columns.
        split: what timm calls it.

    Raises:
        UsageError: it cannot be read, or its labels are not class ids.
    """

    def __init__(self, settings: TimmSettings, split: str) -> None:
        options: dict[str, Any] = {}
        if str(settings.name).startswith("hfds/"):
            options = {"input_key": settings.image_column, "target_key": settings.label_column}
        elif str(settings.root).endswith(".tar"):
            options = {
                "cache_tarfiles": False
            }  # worker processes would share one open file, and its position
        else:
            data_folder(settings.root, "the dataset that timm reads, or give a tar file")
        try:
            root = settings.root and str(settings.root)
            dataset = timm.data.create_dataset(
                settings.name, root=root, split=split, download=settings.download, **options
            )
            self.reader = reader = getattr(dataset, "reader", dataset)
            targets = (
                list(reader.iter_targets())
                if hasattr(reader, "iter_targets")
                else getattr(reader, "targets", None)
            )
            if hasattr(
                reader, "loader"
            ):  # torchvision's, to which every format of Pillow is an image
                reader.loader = open_file
            labels = np.asarray(
                [label for _, label in reader.samples] if targets is None else targets
            ).astype(np.int64, casting="safe")
        except Exception as error:  # timm, torchvision and `datasets` raise nearly anything
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(
                f"data.name={settings.name!r}: must be a dataset that timm can read; for split {split!r} timm reports: {why}"
            ) from error
        super().__init__(labels, f"data.name={settings.name!r}, {split!r}", settings)
        # What no other split may have; none of datasets by name.
        self.files: set[str] = set() if settings.name else set(reader.filenames(absolute=True))
        self.classes: dict[str, int] = getattr(reader, "class_to_idx", {})

    def open(self, index: int) -> Image.Image:
        """One image; a file of a folder is read here, where it has to end."""
        row = int(self.rows[index])
        samples = getattr(self.reader, "samples", None)
        if samples is not None and isinstance(path := samples[row][0], str):
            return open_file(path)
        found = self.reader[row][0]
        if isinstance(found, Image.Image):
            return found
        with found:
            return open_image(found.read(MOST_READ))

    def name(self, index: int) -> str:
        """Split, and number in it."""
        return f"{self.where}: image {self.rows[index]}"

    def fingerprint(self) -> str:
        """Of the name of the dataset and the split, labels and rows; no change of a file alone is noticed."""
        return digest(self.labels, self.where.encode(), self.row_bytes())


class Timm(EncodedImageData):
    """A dataset by its name in timm, in the order of its reader."""

    SETTINGS: ClassVar[type[DataSettings]] = TimmSettings
    settings: TimmSettings

    def encoded(self) -> Mapping[str, EncodedImages]:
        """The splits that are asked for.

        Raises:
            UsageError: one cannot be read, is another one too, or has a class that the first has not.
        """
        return self._images

    @cached_property
    def _images(self) -> dict[str, TimmImages]:
        found: dict[str, TimmImages] = {}
        for split in SPLITS:
            name = getattr(self.settings, f"{split}_split")
            if name is None:
                continue
            images = TimmImages(self.settings, name)
            for other in (other for other, theirs in found.items() if images.files & theirs.files):
                raise UsageError(
                    f"data.{split}_split={name!r}: must differ from the {other} split; null for no such split"
                )
            classes = next(iter(found.values()), images).classes
            if images.classes != classes:
                for unknown in sorted(images.classes.keys() - classes.keys()):
                    raise UsageError(
                        f"data.{split}_split={name!r}: class {unknown!r} must be one of the {next(iter(found))} split's"
                    )
                own = {number: name for name, number in images.classes.items()}
                images.labels = np.array([classes[own[label]] for label in images.labels.tolist()])
            found[split] = images
        return found

    def named_classes(self) -> list[str] | None:
        """Names as the reader has them; None where it has none, or there is nothing to read."""
        if self.settings.root is None and not str(self.settings.name).startswith("hfds/"):
            return None
        classes = next(iter(self._images.values())).classes
        return (
            sorted(classes, key=classes.__getitem__)
            if len(classes) == self.settings.num_classes
            else None
        )
