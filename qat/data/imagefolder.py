"""A folder per class, as torchvision's `ImageFolder` and most tools write them; ImageNet (ILSVRC 2012) comes as one."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from qat.data.arrays import digest
from qat.data.encoded import EncodedImages
from qat.data.image_data import data_folder
from qat.data.kept import stamp
from qat.data.photos import Photos
from qat.errors import UsageError
from qat.utils.files import files_below

log = logging.getLogger(__name__)

# Of a GIF the first picture is read.
EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
LAYOUT = "train/<class>/*, val/<class>/* and test/<class>/*"


class FileImages(EncodedImages):
    """Image files and their classes.

    Args:
        paths: of the files.
        labels: (N,), class ids.
        folder: that all of them are below; names in a fingerprint begin there.
    """

    def __init__(self, paths: NDArray[np.bytes_], labels: NDArray[np.int64], folder: str = "") -> None:
        # One array: a million Python objects would be copied page by page into every worker process, as their counts change.
        self.paths = paths
        super().__init__(labels, folder)

    def open(self, index: int) -> Image.Image:
        """One image."""
        return Image.open(io.BytesIO(Path(self.name(index)).read_bytes()))

    def name(self, index: int) -> str:
        """Its path."""
        return os.fsdecode(self.paths[self.rows[index]])

    def origin(self) -> list[Any]:
        """How many files, and a sum over their paths, sizes and times.

        Raises:
            OSError: one is not there any more.
        """
        known = hashlib.sha256()
        for index in range(len(self)):
            known.update(json.dumps(stamp(self.name(index))).encode())
        return [len(self), known.hexdigest()]

    def fingerprint(self) -> str:
        """Of the names of the files below their folder, and the labels; a file whose content alone has changed is not noticed."""
        start = len(os.fsencode(self.where))
        return digest(self.labels, b"\0".join(path[start:] for path in self.paths[self.rows].tolist()))


class ImageFolder(Photos):
    """`root/{train,val|validation|valid,test}/<class>/*`; class ids are those of the sorted folder names of train.

    Without val a tenth of train is held out, always the same images. Without test, or where it has images but no class folders, val is
    evaluated. Without train a net can be evaluated where another split has a folder for every class.
    """

    def encoded(self) -> dict[str, EncodedImages]:
        """All splits that there are.

        Raises:
            UsageError: `data.root` is not set or not such a folder, or the classes are not those of the settings.
        """
        root = data_folder(self.settings.root, LAYOUT)
        classes, source = self.classes(root), classes_folder(root)
        if len(classes) != self.settings.num_classes:
            why = "" if source.name == "train" else "; without train it needs one for every class, ids are those of the sorted names"
            raise UsageError(f"data.num_classes={self.settings.num_classes}: {source} has {len(classes)} class folders{why}")
        folders = {split: folder for split in FOLDERS if (folder := _first_folder(root, split)) is not None}
        if "test" in folders and _is_flat(folders["test"]):
            log.warning("%s: has images but no class folders, val is evaluated", folders.pop("test"))
        return {split: list_files(folder, classes, source.name) for split, folder in folders.items()}

    def classes(self, root: Path) -> list[str]:
        """Sorted names of the folders below train, or where there is no train below the first split that there is.

        Raises:
            UsageError: there are none.
        """
        return class_names(classes_folder(root))

    def named_classes(self) -> list[str] | None:
        """Names of the folders below train; None without `data.root`."""
        return self.classes(Path(self.settings.root)) if self.settings.root else None

    def count_classes(self, settings: dict[str, Any]) -> int:
        """Number of class folders."""
        return len(self.classes(data_folder(settings.get("root"), LAYOUT)))


class ImageNet(ImageFolder):
    """`root/train/<wnid>/*` and `root/{val,validation}/<wnid>/*`; class ids of pretrained heads are those of the sorted wnids.

    Validation images alone are enough to evaluate a net.
    """

    def classes(self, root: Path) -> list[str]:
        """Sorted wnids.

        Raises:
            UsageError: a folder is not named by its wnid: other names have another order, and a pretrained head would be wrong.
        """
        names = super().classes(root)
        for name in names:
            if not re.fullmatch(r"n\d{8}", name):
                raise UsageError(
                    f"{classes_folder(root) / name}: is no wnid like n01440764; other class names are read by data=imagefolder"
                )
        return names

    def named_classes(self) -> list[str] | None:
        """In words, as timm has them for a wnid; without `data.root` for all 1000."""
        info = ImageNetInfo()
        known = info.label_names()
        words = {wnid: info.label_name_to_description(wnid) for wnid in known}
        wnids = super().named_classes() or (known if self.settings.num_classes == len(known) else [])
        return [words.get(wnid, wnid) for wnid in wnids] or None


def _first_folder(root: Path, split: str) -> Path | None:
    return next((root / name for name in FOLDERS[split] if (root / name).is_dir()), None)


def _is_flat(folder: Path) -> bool:
    """Whether it holds images and no folders, as ILSVRC's test images, whose labels are not published."""
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    return not any(entry.is_dir() for entry in entries) and any(is_image(entry.name) for entry in entries)


def classes_folder(root: Path) -> Path:
    """The folder of the split that says what classes there are: train, else val, else test.

    Raises:
        UsageError: there is none.
    """
    found = [folder for split in FOLDERS if (folder := _first_folder(root, split)) is not None]
    if not found:
        raise UsageError(f"data.root={str(root)!r}: has no folder train; needed are {LAYOUT}, or one of the others to evaluate alone")
    return found[0]


def class_names(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder`, hidden ones left out.

    Raises:
        UsageError: there are none.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UsageError(f"{folder}: holds no class folders; images have to lie in {folder.name}/<class>/")
    return names


def list_files(folder: Path, classes: list[str], source: str = "train") -> FileImages:
    """All image files of one split, by class and then by path.

    Args:
        folder: of the split.
        classes: names of the class folders, in the order of their ids.
        source: name of the split that has them.

    Raises:
        UsageError: a folder is none of `classes`, there is no image, or none of a class in the split that has them.
    """
    ids = {name: number for number, name in enumerate(classes)}
    for name in class_names(folder):
        if name not in ids:
            raise UsageError(f"{folder / name}: is no class of {source}; its classes are {_shown(classes)}")
    found = [(path, ids[name]) for name in classes for path in files_below(folder / name) if is_image(path)]
    labels = np.asarray([label for _, label in found], dtype=np.int64)
    empty = sorted({*range(len(classes))} - {*labels.tolist()})
    if not found or (empty and folder.name == source):
        lacking = folder / classes[empty[0]] if found else folder
        raise UsageError(f"{lacking}: holds no images; known are {', '.join(EXTENSIONS)}")
    return FileImages(np.asarray([os.fsencode(path) for path, _ in found]), labels, str(folder))


def is_image(path: str) -> bool:
    """By its name."""
    return path.lower().endswith(EXTENSIONS) and not os.path.basename(path).startswith(".")


def _shown(names: list[str], at_most: int = 10) -> str:
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
