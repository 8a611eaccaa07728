"""Find the settings of our datasets that match an image processor of Transformers."""

from __future__ import annotations

import importlib
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qat.data.settings import DataSettings
from qat.data.transforms import eval_transform
from qat.errors import UsageError
from qat.utils.validate import MAX_IMAGE_SIDE, check_int

PROCESSOR_FILE = "preprocessor_config.json"
# Heights and widths of the images on which a processor and our transform are compared.
_PROBE_SIZES = ((97, 150), (211, 104))


def processor_settings(folder: Path) -> dict[str, Any]:
    """Find settings with which `eval_transform` prepares images like the processor of a folder.

    Args:
        folder: folder that contains `preprocessor_config.json`; no code in the folder is run.

    Returns:
        `image_size`, `mean`, `std`, `crop_pct`, `crop_mode` and `interpolation`.

    Raises:
        UsageError: the file cannot be used, or no settings reproduce the processor's output on
            images of random pixels.
    """
    auto_processor = importlib.import_module("transformers").AutoImageProcessor
    advice = "set data.mean, data.std, data.crop_pct, data.crop_mode and data.interpolation"
    try:
        processor = auto_processor.from_pretrained(
            folder, backend="pil", trust_remote_code=False, local_files_only=True
        )
        settings = _matching_settings(processor)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = str(error)[:200]
        raise UsageError(
            f"{folder / PROCESSOR_FILE}: cannot be used ({reason}); {advice}"
        ) from error
    if settings is None:
        raise UsageError(
            f"{folder / PROCESSOR_FILE}: data.* cannot express how {type(processor).__name__} "
            f"prepares images; {advice}"
        )
    return settings


def _matching_settings(processor: Any) -> dict[str, Any] | None:
    """Settings that reproduce the processor's output on test images; None if none are found.

    Only outputs are compared, because processors differ in how they resize and crop.
    """
    size = dict(processor.size)
    crop_size = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else {}
    shorter_side: Any = size.get("shortest_edge") or size.get("height")
    for side in (shorter_side, *size.values(), *crop_size.values()):
        check_int(f"size={size} crop_size={crop_size}, side", side, 1, MAX_IMAGE_SIDE)
    image_size = crop_size["height"] if crop_size else shorter_side
    generator = np.random.default_rng(0)
    probes = [generator.integers(0, 256, (*sides, 3), dtype=np.uint8) for sides in _PROBE_SIZES]
    expected_images = [
        processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
        for pixels in probes
    ]
    fraction = image_size / shorter_side
    # timm rounds image_size / crop_pct down, possibly one pixel too low; the float just below the
    # fraction avoids this.
    fractions = (fraction, math.nextafter(fraction, 0), getattr(processor, "crop_pct", fraction))
    for crop_pct, crop_mode in itertools.product(fractions, ("squash", "center_floor")):
        settings = {
            "image_size": image_size,
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
            "interpolation": Image.Resampling(processor.resample).name.lower(),
        }
        transform = eval_transform(
            DataSettings(patch_size=None, in_chans=3, num_classes=1, **settings)
        )
        # A processor may scale and normalize in another order, which changes the last digits.
        are_equal = [
            image.shape == target.shape and torch.allclose(image, target, atol=1e-5)
            for image, target in zip(map(transform, probes), expected_images, strict=True)
        ]
        if all(are_equal):
            return settings
    return None
