"""Training images a second that one core decodes and augments: JPEGs of ImageNet's usual size, through the loader that a run uses.

Run by `make decode-rate`. The images are smooth noise with grain, 500 x 375 pixels at quality 90, near ImageNet's average of 110 kB a file.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.kure_cost import machine
from qat.data import ImageFolder

COUNT, SIZE, QUALITY, GRAIN = 200, (500, 375), 90, 14
SETTINGS = {"none": {}, "light": {}, "timm": {"rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}}


def photo(path: Path, generator: np.random.Generator) -> None:
    """Write one image."""
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    grain = generator.normal(0, GRAIN, (SIZE[1], SIZE[0], 3))
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def main() -> None:
    """Print a line for each kind of augmentation."""
    print(machine())
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
