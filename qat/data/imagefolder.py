"""A folder per class, as torchvision's `ImageFolder` and most tools write them; ImageNet (ILSVRC 2012) comes as one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from qat.data.image_data import EncodedImageData, data_folder
from qat.data.settings import DataSettings
from qat.data.sources import EncodedImages, digest, open_file
from qat.errors import UsageError
from qat.utils.files import files_below

# Of a GIF the first picture is read.
EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
LAYOUT = "train/<class>/*, val/<class>/* and test/<class>/*"


class FileImages(EncodedImages):
    """Image files and their classes.

    Args:
        files: path and class id of each.
        folder: that all of them are below; names in a fingerprint begin there.
        settings: see `EncodedImages`.
    """

    def __init__(self, files: list[tuple[str, int]], folder: str, settings: DataSettings) -> None:
        # One array: a million Python objects would be copied page by page into every worker process, as their counts change.
        self.paths = np.asarray([os.fsencode(path) for path, _ in files])
        super().__init__(
            np.asarray([label for _, label in files], dtype=np.int64), folder, settings
        )

    def open(self, index: int) -> Image.Image:
        """One image."""
        return open_file(self.name(index))

    def name(self, index: int) -> str:
        """Its path."""
        return os.fsdecode(self.paths[self.rows[index]])

    def fingerprint(self) -> str:
        """Of the names of the files below their folder, and the labels; a file whose content alone has changed is not noticed."""
        start = len(os.fsencode(self.where))
        return digest(
            self.labels, b"\0".join(path[start:] for path in self.paths[self.rows].tolist())
        )


class ImageFolder(EncodedImageData):
    """`root/{train,val|validation|valid,test}/<class>/*`; class ids are those of the sorted folder names of train.

    `root/<class>/*` is all train, or with `evaluates_whole` all test.
    Without val a tenth of train is held out, always the same images. Without test, or where it has no class folders, val is
    evaluated. Without train a net can be evaluated where another split has a folder for every class.
    """

    UNREAD = ("image_column", "label_column")

    def encoded(self) -> dict[str, EncodedImages]:
        """All splits that there are.

        Raises:
            UsageError: `data.root` is not set or not such a folder, the classes are not those of the settings or of the split that names
                them, or a split has no images.
        """
        folders, classes = self._folders(), self.classes()
        if len(classes) != self.settings.num_classes:
            here = f"data.root={self.settings.root!r} has {len(classes)} class folders in {LAYOUT}"
            raise UsageError(f"data.num_classes={self.settings.num_classes}: {here}")
        ids = {name: number for number, name in enumerate(classes)}
        source = next(iter(folders))
        found: dict[str, EncodedImages] = {}
        for split, folder in folders.items():
            names = class_names(folder)
            if split == "test" != source and not names:
                continue  # ILSVRC's, whose labels are not published
            if unknown := sorted({*names} - {*classes}):
                raise UsageError(
                    f"{folder / unknown[0]}: unknown class; must be one of {source}'s, {', '.join(classes[:10])} ..."
                )
            files = [
                (path, ids[name])
                for name in classes
                for path in files_below(folder / name)
                if is_image(path)
            ]
            if not files:
                raise UsageError(f"{folder}: holds no images; must hold {', '.join(EXTENSIONS)}")
            found[split] = FileImages(files, str(folder), self.settings)
        return found

    def _folders(self) -> dict[str, Path]:
        """The folder of each split that there is; the first one says what classes there are."""
        root = data_folder(self.settings.root, LAYOUT)
        found = {
            split: root / name
            for split, names in FOLDERS.items()
            for name in names[::-1]
            if (root / name).is_dir()
        }
        if not found and _are_classes(root):
            return {"test" if self.evaluates_whole else "train": root}
        if not found:
            raise UsageError(
                f"data.root={str(root)!r}: has no folder train; training requires {LAYOUT}; evaluation requires one of the other splits"
            )
        return found

    def count_classes(self) -> int:
        """How many class folders there are."""
        return len(self.classes())

    def classes(self) -> list[str]:
        """Sorted names of the folders below train, or where there is no train below the first split that there is."""
        return class_names(next(iter(self._folders().values())))

    def named_classes(self) -> list[str] | None:
        """Names of the folders below train; None without `data.root`."""
        return self.classes() if self.settings.root else None


class ImageNet(ImageFolder):
    """`root/train/<wnid>/*` and `root/{val,validation}/<wnid>/*`; class ids of pretrained heads are those of the sorted wnids.

    Validation images alone are enough to evaluate a net.
    """

    def classes(self) -> list[str]:
        """Sorted wnids.

        Raises:
            UsageError: a folder is not named by its wnid: other names have another order, and a pretrained head would be wrong.
        """
        names = super().classes()
        if wrong := [name for name in names if not re.fullmatch(r"n\d{8}", name)]:
            raise UsageError(
                f"data.root={self.settings.root!r}: class {wrong[0]} is not a WordNet id like n01440764; data=imagefolder takes other names"
            )
        return names

    def named_classes(self) -> list[str] | None:
        """In words, as timm has them for a wnid; without `data.root` for all 1000."""
        info = ImageNetInfo()
        known = info.label_names()
        wnids = super().named_classes() or (
            known if self.settings.num_classes == len(known) else []
        )
        return [
            info.label_name_to_description(wnid) if wnid in known else wnid for wnid in wnids
        ] or None


def _are_classes(root: Path) -> bool:
    """True if there are folders, and each of them has an image."""
    names = class_names(root)
    return bool(names) and all(any(map(is_image, files_below(root / name))) for name in names)


def class_names(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder`, hidden ones left out."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )


def is_image(path: str) -> bool:
    """By its name."""
    return path.lower().endswith(EXTENSIONS) and not os.path.basename(path).startswith(".")
