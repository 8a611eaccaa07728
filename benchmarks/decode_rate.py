"""Training images a second that one core decodes and augments, through the loader that a run uses.

Run by `make decode-rate`. First JPEGs of ImageNet's usual size, by seconds of the processor: smooth noise with grain, 500 x 375 pixels at
quality 90, near ImageNet's average of 110 kB a file. Then small images that are in memory (8 x 8 grey, 32 x 32 in colour), with and without
loader processes, which take turns: by seconds of the processor in all processes, and of the wall.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.kure_cost import machine
from qat.data import ImageArrays, ImageData, ImageFolder

COUNT, SIZE, QUALITY, GRAIN = 200, (500, 375), 90, 14
SMALL_COUNT, SMALL_BATCH, ROUNDS = 4096, 128, 3
SETTINGS = {"none": {}, "light": {}, "timm": {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}}


def photo(path: Path, generator: np.random.Generator) -> None:
    """Write one image."""
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    grain = generator.normal(0, GRAIN, (SIZE[1], SIZE[0], 3))
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


class Small(ImageData):
    """Random images in memory."""

    def read(self) -> dict[str, ImageArrays]:
        """One split."""
        size, chans = self.settings.image_size, self.settings.in_chans
        images = np.random.default_rng(0).integers(0, 256, (SMALL_COUNT, size, size, chans), dtype=np.uint8)
        return {"train": ImageArrays(images, np.arange(SMALL_COUNT) % 10)}


def small(size: int, chans: int, augment: str, workers: int) -> tuple[float, float]:
    """Images a second of the processor and of the wall, behind an epoch that starts the worker processes."""
    settings = {"image_size": size, "patch_size": 4, "in_chans": chans, "num_classes": 10, "mean": [0.5] * chans, "std": [0.25] * chans}
    loader = Small(**settings, batch_size=SMALL_BATCH, augment=augment, num_workers=workers, hflip=0.5).train_dataloader()
    for _ in loader:
        break
    before, began, images = _processor(loader), time.perf_counter(), 0
    for batch in loader:
        images += len(batch[0])
    wall = time.perf_counter() - began
    return images / (_processor(loader) - before), images / wall


def _processor(loader: Any) -> float:
    """Seconds that this process and the loader's have used."""
    processes = getattr(getattr(loader, "_iterator", None), "_workers", [])
    ticks = [Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()[11:13] for one in processes]
    return time.process_time() + sum(int(tick) for pair in ticks for tick in pair) / os.sysconf("SC_CLK_TCK")


def in_memory() -> None:
    """Print the table of small images."""
    found = collections.defaultdict(list)
    kinds = [(size, chans, augment, workers) for size, chans in ((8, 1), (32, 3)) for augment in SETTINGS for workers in (0, 1, 2)]
    for _ in range(ROUNDS):
        for kind in kinds:
            found[kind].append(small(*kind))
    print(f"{SMALL_COUNT} images in memory, batches of {SMALL_BATCH}, medians of {ROUNDS}; images a second")
    for (size, chans, augment, workers), pairs in found.items():
        used, wall = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{size:2} x {size:<2} x {chans} augment={augment:6} num_workers={workers} {used:7.0f} of the processor {wall:7.0f} of the wall"
        )


def main() -> None:
    """Print a line for each kind of augmentation."""
    print(machine())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("photos", "small"), help="one of the two")
    only = parser.parse_args().only
    if only != "small":
        photos()
    if only != "photos":
        in_memory()


def photos() -> None:
    """Print the lines of large images."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", COUNT), ("val", 4)):
            for name in ("ant", "bee"):
                place = Path(folder) / split / name
                place.mkdir(parents=True)
                for number in range(count // 2):
                    photo(place / f"{number}.jpg", generator)
        size = sum(path.stat().st_size for path in Path(folder, "train").rglob("*.jpg")) / COUNT
        print(f"{COUNT} images of {SIZE[0]} x {SIZE[1]}, {size / 1000:.0f} kB each")
        for augment, more in SETTINGS.items():
            settings = {"root": folder, "num_classes": 2, "in_chans": 3, "image_size": 224, "patch_size": None, "in_memory": False}
            statistics = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 0.9, "interpolation": "bicubic"}
            data = ImageFolder(**settings, **statistics, batch_size=50, augment=augment, **more)
            loader = data.train_dataloader()
            began = time.process_time()
            images = sum(len(batch[0]) for batch in loader)
            print(f"augment={augment:6} {images / (time.process_time() - began):6.0f} images a second", flush=True)


if __name__ == "__main__":
    main()
