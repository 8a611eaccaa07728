"""What timm's dataset factory reads: folders, tar files, webdataset shards, datasets of torchvision, Hugging Face and TensorFlow."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm.data
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import IterableDataset

from qat.data.arrays import MEGABYTE, digest, to_pil, to_pixels
from qat.data.encoded import SKIP, EncodedImages, ImageError
from qat.data.image_data import data_folder
from qat.data.photos import Photos, completed
from qat.data.settings import DataSettings
from qat.errors import UsageError
from qat.utils.validate import check_text

log = logging.getLogger(__name__)

PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets", "wds": "webdataset"}
NEED_ROOT = ("", "torch", "wds")
# Of a split of `datasets` or TensorFlow: a name, and perhaps where a slice of it begins and ends, in rows or in percent.
PART = re.compile(r"(\w+(?:\.\w+)*)(?:\[(-?\d+)?(%)?:(-?\d+)?(%)?\])?")


@dataclass(frozen=True)
class TimmSettings(DataSettings):
    """The knobs of `data/timm.yaml`; `image_column` and `label_column` are timm's `input_key` and `target_key`.

    Attributes:
        name: of the dataset in timm, its reader in front of a slash; empty = a folder or a tar file.
        train_split: name of the split that a net learns from; None = there is none.
        val_split: name of the split that chooses among checkpoints; None = a tenth of train is held out, always the same images.
        test_split: name of the split that is evaluated in the end; None = val is.
        download: whether datasets of torchvision and TensorFlow are downloaded.
    """

    name: str = ""
    train_split: str | None = "train"
    val_split: str | None = "validation"
    test_split: str | None = None
    download: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.name, str) or self.reader not in {"", "torch", *PACKAGES}:
            readers = ", ".join(f"{reader}/NAME" for reader in ("torch", *PACKAGES))
            raise UsageError(f"data.name={self.name!r}: must be empty (a folder or a tar file), or one of {readers}")
        for name in ("train_split", "val_split", "test_split"):
            if getattr(self, name) is not None:
                check_text(f"data.{name}", getattr(self, name))
        if not isinstance(self.download, bool):
            raise UsageError(f"data.download={self.download!r}: must be true or false")

    @property
    def reader(self) -> str:
        """What stands in front of the slash."""
        return self.name.partition("/")[0].lower()

    @property
    def named_splits(self) -> dict[str, str]:
        """What timm calls the splits that are asked for."""
        names = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        return {split: name for split, name in names.items() if name is not None}


class TimmImages(EncodedImages):
    """One split as timm reads it.

    Args:
        settings: name, root, columns.
        split: what timm calls it.
        class_map: class ids by name, for folders and tar files; None = those of the sorted names.

    Raises:
        UsageError: it cannot be read, or its labels are not class ids.
    """

    def __init__(self, settings: TimmSettings, split: str, class_map: Mapping[str, int] | None = None) -> None:
        self.settings, self.split, self.left_out = settings, split, 0
        try:
            labels = self._read(class_map)
        except UsageError:
            raise
        except Exception as error:  # timm, torchvision and the packages behind them raise nearly anything
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise UsageError(f"data.name={settings.name!r}: must be a dataset that timm can read; of {split!r} it says: {why}") from error
        if not len(labels):
            raise UsageError(f"data.name={settings.name!r}: must hold images; {split!r} has none")
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise UsageError(f"data.label_column={settings.label_column!r}: must hold one class id for each image of {split!r}")
        super().__init__(labels.astype(np.int64), f"data.name={settings.name!r}, {split!r}")

    def _read(self, class_map: Mapping[str, int] | None) -> NDArray[Any]:
        """Open the split; gives its labels as they are stored."""
        chosen = self.settings
        root = chosen.root and os.path.abspath(chosen.root)  # never a "pipe:command", which webdataset would run
        options: dict[str, Any] = {"root": root, "split": self.split, "download": chosen.download, "class_map": class_map}
        # "" leaves the mode as stored: timm turns 16-bit grey white. TensorFlow's decoder needs one of the two.
        options["input_img_mode"] = "" if chosen.reader != "tfds" else "L" if chosen.in_chans == 1 else "RGB"
        if chosen.reader in PACKAGES:
            options |= {"input_key": chosen.image_column, "target_key": chosen.label_column}
        elif chosen.root is not None and chosen.root.endswith(".tar"):
            options["cache_tarfiles"] = False  # worker processes would share one open file, and its position
        dataset = timm.data.create_dataset(chosen.name, **options)
        source = getattr(dataset, "reader", dataset)
        self._items: Any = self._in_order(dataset) if isinstance(dataset, IterableDataset) else source
        self.classes: dict[str, int] = getattr(source, "class_to_idx", getattr(source, "class_name_to_idx", {}))
        info = getattr(getattr(source, "dataset", getattr(source, "builder", None)), "info", None)
        self.lengths = {name: known.num_examples for name, known in (getattr(info, "splits", None) or {}).items()}
        part = getattr(source, "train", getattr(source, "split", "")) if chosen.reader == "torch" else ""
        # One that begins with another's has images of it.
        self.place = os.path.join(self.split if chosen.reader in PACKAGES else source.root, f"{part}", "")
        return np.asarray(_targets(source, self._items))

    def _in_order(self, dataset: Any) -> list[tuple[Image.Image, int]]:
        """All images of a reader that has no index, whatever process this is."""
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        items, size = [], 0
        for stored, label in dataset:
            image = stored
            with suppress(ValueError):  # one that cannot be converted stays: who opens it says why
                image = to_pil(to_pixels(stored, self.settings.in_chans))
            size += image.width * image.height * len(image.getbands())
            if size > self.settings.memory_mb * MEGABYTE:
                limit = f"data.memory_mb={self.settings.memory_mb:g}"
                raise UsageError(f"{limit}: must hold all images of {self.split!r}: {self.settings.reader}/ has no index; hfds/ has one")
            items.append((image, label))
        if self.settings.reader == "wds":  # the others stop at an image that they cannot decode
            self._note_dropped(len(items), dataset.reader.num_samples)
        return items

    def _note_dropped(self, read: int, total: int) -> None:
        """Raise, or count and warn of, images that timm dropped by itself."""
        self.left_out = max(0, total - read)
        if not self.left_out:
            return
        line = f"timm reads {read} of {total} images of {self.split!r}, others are damaged or have no label"
        if self.settings.on_error == "raise":
            raise ImageError(f"data.name={self.settings.name!r}: {line}; {SKIP}")
        log.warning("data.on_error=skip: %s", line)

    def shares_images(self, other: TimmImages) -> bool:
        """Whether some of these are images of `other`, too."""
        ours, theirs = (_rows(images.split, images.lengths) for images in (self, other))
        if ours is None or theirs is None:
            return self.place.startswith(other.place) or other.place.startswith(self.place)
        return any(one == name and max(first, begin) < min(last, end) for one, first, last in ours for name, begin, end in theirs)

    def open(self, index: int) -> Image.Image:
        """One image."""
        found = self._items[int(self.rows[index])][0]
        if isinstance(found, Image.Image):
            return found
        with found:
            return Image.open(io.BytesIO(found.read()))

    def name(self, index: int) -> str:
        """Split, and number in it."""
        return f"{self.where}: image {self.rows[index]}"

    def origin(self) -> None:
        """Decoded pixels are not kept: what they depend on is timm's."""

    def fingerprint(self) -> str:
        """Of the name of the dataset, labels and rows, and names of files in folders and tar files; no change of pixels is noticed."""
        names = self._items.filenames() if self.settings.reader == "" else []
        known = "\0".join([self.settings.name.lower(), *(names[row] for row in self.rows[: len(names)])])
        return digest(self.labels, os.fsencode(known), self.row_bytes())


def _rows(split: str, lengths: Mapping[str, int]) -> list[tuple[str, int, int]] | None:
    """Name, first row and end of each part of `split`; None where it is written otherwise or a length is not known."""
    found = []
    for part in lengths if split == "all" else split.split("+"):
        match = PART.fullmatch(part.strip())
        length = lengths.get(match[1]) if match else None
        if match is None or not length:
            return None
        in_percent = match[3] or match[5]
        bounds = [bound and round(int(bound) * length / 100 if in_percent else int(bound)) for bound in match.group(2, 4)]
        found.append((match[1], *slice(*bounds).indices(length)[:2]))
    return found


def _targets(source: Any, items: Any) -> Any:
    """Class ids in the order of the images, none of which is decoded."""
    if isinstance(items, list):
        return [label for _, label in items]
    if hasattr(source, "iter_targets"):
        return list(source.iter_targets())
    return source.targets if hasattr(source, "targets") else [label for _, label in source.samples]


class Timm(Photos):
    """A dataset by its name in timm, in the order of its reader.

    Readers without an index (wds, hfids, tfds) are read once from beginning to end, into memory; so they too are shuffled and resumed
    exactly. torchvision unpickles CIFAR's files only if their sums are those of the published ones; `Cifar10` unpickles nothing.
    """

    SETTINGS: ClassVar[type[DataSettings]] = TimmSettings
    settings: TimmSettings

    def encoded(self) -> Mapping[str, EncodedImages]:
        """The splits that are asked for.

        Raises:
            UsageError: one cannot be read, shares images with another, or has classes that train does not have.
        """
        return self._images

    def left_out(self) -> dict[str, int]:
        """How many images of each split could not be decoded under `data.on_error=skip`, those that timm dropped among them."""
        found = super().left_out()
        for split in self._splits:
            if split in self._images and (dropped := self._images[split].left_out):
                found[split] = found.get(split, 0) + dropped
        return found

    def named_classes(self) -> list[str] | None:
        """Names as the reader has them; None where it has none."""
        classes = next(iter(self._images.values())).classes
        return sorted(classes, key=classes.__getitem__) if len(classes) == self.settings.num_classes else None

    def count_classes(self, settings: dict[str, Any]) -> int:
        """Number of names, or highest label of the first split plus one."""
        first = next(iter(_read_splits(TimmSettings(**completed({**settings, "num_classes": 1}))).values()))
        return len(first.classes) or int(first.labels.max(initial=-1)) + 1

    @cached_property
    def _images(self) -> dict[str, TimmImages]:
        return _read_splits(self.settings)


def _read_splits(settings: TimmSettings) -> dict[str, TimmImages]:
    _check_readable(settings)
    found: dict[str, TimmImages] = {}
    for split, name in settings.named_splits.items():
        images = TimmImages(settings, name)
        setting = f"data.{split}_split={name!r}"
        for other, seen in found.items():
            if images.shares_images(seen):
                raise UsageError(f"{setting}: must be other images than data.{other}_split={seen.split!r}; null for no such split")
        first = next(iter(found.values()), images)
        if unknown := sorted(set(images.classes) - set(first.classes)):
            raise UsageError(f"{setting}: must have the classes of {first.split!r}, which has no {unknown[0]!r}")
        found[split] = images if images.classes == first.classes else TimmImages(settings, name, first.classes)
    return found


def _check_readable(settings: TimmSettings) -> None:
    """Raise `UsageError` where a package, the root or every split is missing."""
    package = PACKAGES.get(settings.reader)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UsageError(f"data.name={settings.name!r}: must be read with the package {package}, which is not installed")
    if settings.reader in NEED_ROOT and not (settings.root and settings.root.endswith(".tar") and Path(settings.root).is_file()):
        data_folder(settings.root, "the dataset that timm reads, or give a tar file")
    if not settings.named_splits:
        raise UsageError("data.train_split=None: must be a split of the dataset where data.val_split and data.test_split are null")
    # Releases of `datasets` before 4.0 run a script that comes with a dataset.
    os.environ.setdefault("HF_DATASETS_TRUST_REMOTE_CODE", "0")
