"""Datasets with a folder per class, as in torchvision's `ImageFolder`; ImageNet (ILSVRC 2012)."""

from __future__ import annotations

import itertools
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

# Only the first frame of a GIF is read.
EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
LAYOUT = "train/<class>/*, val/<class>/* and test/<class>/*"


class FileImages(EncodedImages):
    """Image files and their classes.

    Args:
        files: path and class id of each image.
        folder: folder of all files; a fingerprint depends on paths relative to this folder.
        settings: see `EncodedImages`.
    """

    def __init__(self, files: list[tuple[str, int]], folder: str, settings: DataSettings) -> None:
        # Use one array: a million Python objects would be copied page by page into every worker
        # process when their reference counts change.
        self.paths = np.asarray([os.fsencode(path) for path, _ in files])
        labels = np.asarray([label for _, label in files], dtype=np.int64)
        super().__init__(labels, folder, settings)

    def open(self, index: int) -> Image.Image:
        """Open one image."""
        return open_file(self.name(index))

    def name(self, index: int) -> str:
        """Path of one image."""
        return os.fsdecode(self.paths[self.rows[index]])

    def fingerprint(self) -> str:
        """Hash of labels and relative paths, which does not depend on the contents of files."""
        prefix_length = len(os.fsencode(self.origin))
        relative_paths = [path[prefix_length:] for path in self.paths[self.rows].tolist()]
        return digest(self.labels, b"\0".join(relative_paths))


class ImageFolder(EncodedImageData):
    """Images in `root/{train,val|validation|valid,test}/<class>/*`.

    The folders may also be named `training` and `testing`. Names of splits may contain capital
    letters if `root` contains no other folders.
    Class ids follow the sorted names of the class folders of train. If `root` contains class
    folders but no splits, all images belong to train, or to test with `evaluates_whole`. If there
    is no val, a fixed tenth of train is held out. If there is no test, or test has no class
    folders, val is evaluated. Without train, a net can be evaluated if another split has a folder
    for every class.
    """

    UNREAD = ("image_column", "label_column")

    def encoded(self) -> dict[str, EncodedImages]:
        """All existing splits, except a test split without class folders.

        Raises:
            UsageError: `data.root` is not set, or lacks the folders `train/<class>/*` etc.; the
                number of classes differs from `data.num_classes`; a split has a class that the
                first split lacks; or a split, or a class of train, has no images.
        """
        folders = self._folders()
        classes = self.classes()
        if len(classes) != self.settings.num_classes:
            first_folder = next(iter(folders.values())).name
            raise UsageError(
                f"data.num_classes={self.settings.num_classes}: data.root={self.settings.root!r} "
                f"has {len(classes)} class folders in {first_folder}/<class>/*; "
                "the two numbers must be equal"
            )
        first_split = next(iter(folders))
        splits: dict[str, EncodedImages] = {}
        for split, folder in folders.items():
            names = class_names(folder)
            if split == "test" and split != first_split and not names:
                continue  # for example ILSVRC, whose test labels are not published
            unknown = sorted(set(names) - set(classes))
            if unknown:
                raise UsageError(
                    f"{folder / unknown[0]}: unknown class; "
                    f"must be a class of the {first_split} split: {', '.join(classes[:10])} ..."
                )
            files = _labelled_files(folder, classes)
            labels = {label for _, label in files}
            empty_classes = [name for label, name in enumerate(classes) if label not in labels]
            if not files or (split == "train" and empty_classes):
                empty_folder = folder / empty_classes[0] if files else folder
                raise UsageError(
                    f"{empty_folder}: has no images; must contain files that end in "
                    f"{', '.join(EXTENSIONS)}"
                )
            splits[split] = FileImages(files, str(folder), self.settings)
        return splits

    def _folders(self) -> dict[str, Path]:
        """Folder of each existing split; the first split defines the classes."""
        root = data_folder(self.settings.root, LAYOUT)
        present = {name: root / name for name in class_names(root)}
        split_names = set(itertools.chain.from_iterable(FOLDERS.values()))
        if all(name.lower() in split_names for name in present):
            present = {name.lower(): folder for name, folder in present.items()}
        folders: dict[str, Path] = {}
        for split, names in FOLDERS.items():
            existing = [present[name] for name in names if name in present]
            if existing:
                folders[split] = existing[0]
        if folders:
            return folders
        if _has_class_folders(root):
            return {"test" if self.evaluates_whole else "train": root}
        raise UsageError(
            f"data.root={str(root)!r}: has no folder train; training requires {LAYOUT}; "
            "evaluation requires one of the other splits"
        )

    def count_classes(self) -> int:
        """Number of class folders."""
        return len(self.classes())

    def classes(self) -> list[str]:
        """Sorted names of the class folders of train, or else of the first split.

        Raises:
            UsageError: `data.root` is not a folder with splits or classes.
        """
        return class_names(next(iter(self._folders().values())))

    def named_classes(self) -> list[str] | None:
        """Return the names of the class folders, or None if `data.root` is not set."""
        return self.classes() if self.settings.root else None


class ImageNet(ImageFolder):
    """Images of ImageNet in the folders of `ImageFolder`; class folders are named by wnids.

    A wnid is a WordNet id such as n01440764. Class ids follow the sorted wnids, as in the heads of
    pretrained nets. Evaluation needs no training images.
    """

    def classes(self) -> list[str]:
        """Sorted wnids.

        Raises:
            UsageError: as for `ImageFolder`, or the name of a class folder is not a wnid. Other
                names sort differently, so that class ids would not match a pretrained head.
        """
        names = super().classes()
        for name in names:
            if not re.fullmatch(r"n\d{8}", name):
                raise UsageError(
                    f"data.root={self.settings.root!r}: "
                    f"class {name} is not a WordNet id like n01440764; "
                    "data=imagefolder accepts other names"
                )
        return names

    def named_classes(self) -> list[str] | None:
        """Return timm's descriptions of the wnids; without `root`, of all 1000 classes.

        Returns None without `root` if `num_classes` is not 1000. Unknown wnids are kept.
        """
        info = ImageNetInfo()
        all_wnids = info.label_names()
        wnids = super().named_classes()
        if not wnids and self.settings.num_classes == len(all_wnids):
            wnids = all_wnids
        if not wnids:
            return None
        names = []
        for wnid in wnids:
            is_known = wnid in all_wnids
            names.append(info.label_name_to_description(wnid) if is_known else wnid)
        return names


def _labelled_files(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    files = []
    for class_id, name in enumerate(classes):
        for path in files_below(os.path.join(folder, name), hidden=False):
            if is_image_file(path):
                files.append((path, class_id))
    return files


def _has_class_folders(root: Path) -> bool:
    """True if there are folders and each folder contains an image."""
    names = class_names(root)
    for name in names:
        if not any(is_image_file(path) for path in files_below(root / name, hidden=False)):
            return False
    return bool(names)


def class_names(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder` that are not hidden."""
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in folders if not name.startswith("."))


def is_image_file(path: str) -> bool:
    """True for a path with an image's extension whose file name has no leading dot."""
    return path.lower().endswith(EXTENSIONS) and not os.path.basename(path).startswith(".")
