"""timm's augmentation strings: only those that say what timm will do, and only operations that Pillow can carry out."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import timm.data
from PIL import Image, ImageOps

from qat.data.sampler import isolated_rng
from qat.errors import UsageError

HIGHEST_LEVEL = 10
AUGMENTATIONS = ("none", "light", "timm")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
ERASE_MODES = ("pixel", "const", "rand")
NUMBER = r"\d+(\.\d+)?"
# Source: docstrings of timm.data.auto_augment. timm itself passes over a section that it cannot read.
PATTERNS = (
    rf"rand(-(m\d+|n\d+|p{NUMBER}|mstd{NUMBER}|mmax\d+|inc[01]|t(weights|3a|3aw)))*",
    rf"augmix(-(m\d+|w[1-9]\d*|d\d+|a{NUMBER}|b[01]|mstd{NUMBER}))*",
    rf"(original|originalr|v0|v0r|3a)(-mstd{NUMBER})?",
)
ALLOWED = (
    "null, rand with sections -mN -nN -pX -mstdX -mmaxN -inc0|1 -tweights|3a|3aw, augmix with -mN -wN -dN -aX -b0|1 -mstdX, "
    "and original, originalr, v0, v0r, 3a with -mstdX"
)


def check_auto_augment(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is None or one of timm's augmentation strings that works."""
    if value is None:
        return
    if not isinstance(value, str) or not any(re.fullmatch(pattern, value) for pattern in PATTERNS):
        raise UsageError(f"{setting}={value!r}: must be one of {ALLOWED}")
    try:
        transform = timm.data.create_transform(8, is_training=True, auto_augment=value)
        with isolated_rng(0):
            restrict_to_pillow(transform)(Image.new("RGB", (8, 8)))
    except (AssertionError, ValueError, IndexError) as error:  # such as more layers than there are operations
        raise UsageError(f"{setting}={value!r}: timm cannot do that ({error}); must be one of {ALLOWED}") from error


def restrict_to_pillow(transform: Any) -> Any:
    """One of timm's training transforms, its operations changed in place to what Pillow can do.

    A level of exactly 10 would draw at the very end of each range; only a string's own `mmax` goes there and beyond.
    """
    for step in transform.transforms:
        sequences = (getattr(step, "ops", ()), *getattr(step, "policy", ()))
        for operation in itertools.chain(*sequences):
            if operation.magnitude_max is None:
                operation.magnitude_max = math.nextafter(HIGHEST_LEVEL, 0)
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
            if operation.kwargs["resample"] == Image.Resampling.LANCZOS:
                # Pillow scales with it, but does not rotate or shear.
                operation.kwargs["resample"] = Image.Resampling.BICUBIC
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Pillow refuses to keep no bit at all, which timm asks for at one end of the levels."""
    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))
