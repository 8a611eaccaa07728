"""Hold validation images out of the training images, and find duplicate splits."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.data.sources import ImageError, ImageSource
from qat.errors import UsageError
from qat.launch.ranks import is_first

log = logging.getLogger(__name__)

# This seed is fixed, so that different runs and seeds are compared on the same images.
SPLIT_SEED = 0
VAL_FRACTION = 0.1
# Duplicate splits are recognized by the pixels of at least this many images, or of all if fewer.
SAMPLE_SIZE = 64


def stratified_split(
    labels: NDArray[np.int64], held_out_fraction: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split images so that both parts have the same class distribution.

    The same labels are always split in the same way.

    Args:
        labels: (N,), class ids.
        held_out_fraction: fraction of held-out images.

    Returns:
        Sorted indices of the remaining images, and of the held-out images.

    Raises:
        UsageError: there are too few images, overall or of a class.
    """
    # The import is here because it takes half a second (it loads pandas), and most photo datasets
    # have their own splits.
    from sklearn.model_selection import train_test_split

    indices = np.arange(len(labels))
    try:
        remaining, held_out_indices = train_test_split(
            indices, test_size=held_out_fraction, random_state=SPLIT_SEED, stratify=labels
        )
    except ValueError as error:
        raise UsageError(
            f"data: {held_out_fraction:.0%} of {len(labels)} train images cannot be held out "
            f"({error})"
        ) from error
    return np.sort(remaining), np.sort(held_out_indices)


def hold_out(splits: Mapping[str, Any]) -> dict[str, Any]:
    """If there is `train` but no `val`, create `val` by moving a fixed tenth of `train` into it.

    A warning names any split that is a copy of another split, or a link to it.

    Args:
        splits: `ImageArrays` or encoded images, by name.

    Raises:
        UsageError: `train` has too few images, overall or of a class.
    """
    for name, other_name in itertools.combinations(splits, 2):
        if is_first() and _are_equal(splits[name], splits[other_name]):
            log.warning(
                "data: %s and %s contain the same images; "
                "accuracy on %s does not show how the model does on new images",
                name,
                other_name,
                other_name,
            )
    if "train" not in splits or "val" in splits:
        return dict(splits)
    train = splits["train"]
    train_indices, val_indices = stratified_split(train.labels, VAL_FRACTION)
    return {**splits, "train": train.take(train_indices), "val": train.take(val_indices)}


def _are_equal(images: ImageSource, other_images: ImageSource) -> bool:
    """True if labels, and the pixels of a sample of images, are equal and in the same order."""
    if not np.array_equal(images.labels, other_images.labels):
        return False
    sample = range(0, len(images), max(len(images) // SAMPLE_SIZE, 1))
    try:
        return all(np.array_equal(images[i][0], other_images[i][0]) for i in sample)
    except ImageError:  # the error is raised again when a run needs the image
        return False
