"""Training images a second that one core decodes and augments, through the loader that a run uses.

Run by `make decode-rate`. First JPEGs of ImageNet's usual size: smooth noise with grain, 500 x 375 pixels at quality 90, near ImageNet's
average of 110 kB a file. Then 32 x 32 pixels in memory, with and without loader processes. By seconds of the processor in all processes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import machine
from qat.data import ImageArrays, ImageData, ImageFolder

COUNT, SIZE, QUALITY, GRAIN = 200, (500, 375), 90, 14
SMALL_COUNT, SMALL_SIZE, SMALL_BATCH, ROUNDS = 4096, 32, 128, 3
SETTINGS: dict[str, dict[str, Any]] = {"none": {}, "light": {}, "timm": {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}}


def photo(path: Path, generator: np.random.Generator) -> None:
    """Write one image."""
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    grain = generator.normal(0, GRAIN, (SIZE[1], SIZE[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


class Small(ImageData):
    """Random images in memory."""

    def read(self) -> dict[str, ImageArrays]:
        """One split."""
        images = np.random.default_rng(0).integers(0, 256, (SMALL_COUNT, SMALL_SIZE, SMALL_SIZE, 3), dtype=np.uint8)
        return {"train": ImageArrays(images, np.arange(SMALL_COUNT) % 10)}


def rate(data: ImageData) -> float:
    """Images a second of the processor, behind an epoch that starts the worker processes."""
    loader = data.train_dataloader()
    for _ in loader:
        break
    before = _processor(loader)
    images = sum(len(batch[0]) for batch in loader)
    return images / (_processor(loader) - before)


def _processor(loader: Any) -> float:
    """Seconds that this process and the loader's have used."""
    processes = getattr(getattr(loader, "_iterator", None), "_workers", [])
    ticks = [Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()[11:13] for one in processes]
    return time.process_time() + sum(int(tick) for pair in ticks for tick in pair) / os.sysconf("SC_CLK_TCK")


def photos() -> None:
    """Print the lines of large images."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", COUNT), ("val", 4)):
            for number in range(count):
                photo(Path(folder, split, "ant" if number % 2 else "bee", f"{number}.jpg"), generator)
        size = sum(path.stat().st_size for path in Path(folder, "train").rglob("*.jpg")) / COUNT
        print(f"{COUNT} images of {SIZE[0]} x {SIZE[1]}, {size / 1000:.0f} kB each")
        shape = {"root": folder, "num_classes": 2, "in_chans": 3, "image_size": 224, "patch_size": None, "memory_mb": 0}
        pixels = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 0.9, "interpolation": "bicubic"}
        for augment, more in SETTINGS.items():
            found = rate(ImageFolder(**shape, **pixels, batch_size=50, augment=augment, **more))
            print(f"augment={augment:6} {found:6.0f} images a second", flush=True)


def in_memory() -> None:
    """Print the lines of small images."""
    print(f"{SMALL_COUNT} images of {SMALL_SIZE} x {SMALL_SIZE} in memory, batches of {SMALL_BATCH}, medians of {ROUNDS}")
    shape = {"image_size": SMALL_SIZE, "patch_size": 4, "in_chans": 3, "num_classes": 10, "mean": [0.5] * 3, "std": [0.25] * 3}
    for augment in SETTINGS:
        for workers in (0, 1, 2):
            settings = {**shape, "batch_size": SMALL_BATCH, "augment": augment, "num_workers": workers, "hflip": 0.5}
            found = statistics.median(rate(Small(**settings)) for _ in range(ROUNDS))
            print(f"augment={augment:6} num_workers={workers} {found:7.0f} images a second", flush=True)


if __name__ == "__main__":
    print(machine())
    photos()
    in_memory()
