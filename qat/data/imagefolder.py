"""A folder per class, as torchvision's `ImageFolder` and most tools write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.data.arrays import ImageSource, stratified_split
from qat.data.encoded import as_labels
from qat.data.folders import data_folder
from qat.data.lazy import load
from qat.data.photos import Photos
from qat.errors import UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
LAYOUT = "train/<class>/*, val/<class>/* and test/<class>/*"


class FileImages:
    """Image files and their classes.

    Args:
        paths: of the files.
        labels: (N,), class ids.
    """

    def __init__(self, paths: NDArray[np.bytes_], labels: NDArray[np.int64]) -> None:
        # One array: a million Python objects would be copied page by page into every worker process, as their counts change.
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        return len(self.labels)

    def content(self, index: int) -> bytes:
        """The bytes of one image file."""
        return Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        """Its path."""
        return os.fsdecode(self.paths[index])

    def take(self, indices: NDArray[np.int64]) -> FileImages:
        """The files at `indices`."""
        return FileImages(self.paths[indices], self.labels[indices])


class ImageFolder(Photos):
    """`root/{train,val|validation|valid,test}/<class>/*`; class ids are those of the sorted folder names of train.

    Without val a tenth of train is held out, always the same images. Without test, val is evaluated.
    """

    HELD_OUT = 0.1

    def read(self) -> dict[str, ImageSource]:
        """All splits that there are.

        Raises:
            UsageError: `data.root` is not set or not such a folder, or the classes are not those of the settings.
        """
        root = data_folder(self.settings.root, LAYOUT)
        classes = self.classes(root)
        if len(classes) != self.settings.num_classes:
            raise UsageError(f"data.num_classes={self.settings.num_classes}: {root / 'train'} has {len(classes)} class folders")
        folders = {split: _first_folder(root, split) for split in FOLDERS}
        files = {split: list_files(folder, classes) for split, folder in folders.items() if folder is not None}
        if "val" not in files:
            kept, out = stratified_split(files["train"].labels, self.HELD_OUT)
            files |= {"train": files["train"].take(kept), "val": files["train"].take(out)}
        return {split: load(images, self.settings, where=str(folders[split] or folders["train"])) for split, images in files.items()}

    def classes(self, root: Path) -> list[str]:
        """Sorted names of the folders below train.

        Raises:
            UsageError: there are none.
        """
        folder = _first_folder(root, "train")
        if folder is None:
            raise UsageError(f"data.root={str(root)!r}: has no folder train; needed are {LAYOUT}")
        return class_names(folder)

    def count_classes(self, settings: dict[str, Any]) -> int:
        """Number of class folders below train."""
        return len(self.classes(data_folder(settings.get("root"), LAYOUT)))


def _first_folder(root: Path, split: str) -> Path | None:
    return next((root / name for name in FOLDERS[split] if (root / name).is_dir()), None)


def class_names(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder`, hidden ones left out.

    Raises:
        UsageError: there are none.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UsageError(f"{folder}: holds no class folders; images have to lie in {folder.name}/<class>/")
    return names


def list_files(folder: Path, classes: list[str]) -> FileImages:
    """All image files of one split, by class and then by path.

    Raises:
        UsageError: a folder is none of `classes`, or there is no image.
    """
    ids = {name: number for number, name in enumerate(classes)}
    paths: list[bytes] = []
    labels: list[int] = []
    for name in class_names(folder):
        if name not in ids:
            raise UsageError(f"{folder / name}: is no class of train; its classes are {_shown(classes)}")
        walked = (os.path.join(at, file) for at, _, files in os.walk(folder / name, followlinks=True) for file in files)
        found = sorted(path for path in walked if path.lower().endswith(EXTENSIONS) and not os.path.basename(path).startswith("."))
        paths += [os.fsencode(path) for path in found]
        labels += [ids[name]] * len(found)
    if not paths:
        raise UsageError(f"{folder}: holds no images; known are {', '.join(EXTENSIONS)}")
    return FileImages(np.asarray(paths), as_labels(labels))


def _shown(names: list[str], at_most: int = 10) -> str:
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
