"""Images in parquet files as Hugging Face's `datasets` writes them: a struct of encoded bytes and an integer label."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qat.data.base import ImageArrays
from qat.errors import UsageError

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def find_parquet(root: str | None, split: str) -> list[Path]:
    """Files below `root` whose name starts with `split`, in order.

    Raises:
        UsageError: no root, no such folder, or no such files.
    """
    if root is None:
        raise UsageError("data.root is not set: give the folder that holds train*.parquet and test*.parquet")
    folder = Path(root)
    if not folder.is_dir():
        raise UsageError(f"data.root={root!r}: no such folder")
    files = sorted(folder.rglob(f"{split}*.parquet"))
    if not files:
        raise UsageError(f"data.root={root!r}: holds no {split}*.parquet")
    return files


def _column(table: pa.Table, names: tuple[str, ...], file: Path) -> pa.ChunkedArray:
    for name in names:
        if name in table.column_names:
            return table.column(name)
    raise UsageError(f"{file}: has columns {', '.join(table.column_names)}; one of {', '.join(names)} is needed")


def _labels(table: pa.Table, file: Path) -> list[int]:
    labels = _column(table, LABEL_COLUMNS, file).to_pylist()
    for row, label in enumerate(labels):
        if not isinstance(label, int):
            raise UsageError(f"{file}: label {label!r} of image {row} is not a whole number")
    return labels


def decode(content: bytes, chans: int) -> NDArray[np.uint8]:
    """One encoded image as (H, W, chans) uint8; chans 1 = grey, 3 = RGB."""
    image = Image.open(io.BytesIO(content)).convert("L" if chans == 1 else "RGB")
    return np.asarray(image).reshape(image.height, image.width, -1)


def read_parquet(files: list[Path], chans: int) -> ImageArrays:
    """Decode all images of the files, which must be of one size.

    Raises:
        UsageError: a file is not such a parquet, a label is missing, an image cannot be decoded, there are none, or sizes differ.
    """
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{file}: cannot be read as parquet ({error})") from error
        column = _column(table, IMAGE_COLUMNS, file)
        labels += _labels(table, file)
        for row, cell in enumerate(column.to_pylist()):
            try:
                images.append(decode(cell["bytes"], chans))
            except (UnidentifiedImageError, OSError, TypeError, KeyError) as error:
                raise UsageError(f"{file}: image {row} cannot be decoded ({error})") from error
    if not images:
        raise UsageError(f"{files[0].parent}: no images in {', '.join(file.name for file in files)}")
    if len({image.shape for image in images}) > 1:
        raise UsageError(f"{files[0].parent}: images have different sizes, one size is needed here")
    return ImageArrays(np.stack(images), np.asarray(labels, dtype=np.int64))
