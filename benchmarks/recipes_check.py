"""Every published recipe for two steps per stage at full size, on random images: `make recipes-check`.

Nothing is downloaded: the float start, which is the teacher too, has random weights. What the check shows is that each recipe builds,
trains, hands its weights and moments to the second stage and trains on.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
from PIL import Image

import qat

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "deit_t": "deit_tiny_distilled_patch16_224",
    "deit_s": "deit_small_distilled_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
}
CLASSES = 2
BATCH = 2
# Two steps are less than an epoch of warm-up; all else is the recipe's.
SMALL = (
    f"data.num_classes={CLASSES}",
    f"data.batch_size={BATCH}",
    "data.num_workers=0",
    f"data.calibration_images={BATCH}",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "scheduler.warmup_epochs=0",
    "scheduler.cooldown_epochs=0",
    "overwrite=true",
)


def write_images(root: Path) -> None:
    """An ImageNet-like folder of random JPEGs."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in range(CLASSES):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(folder / f"{i}.JPEG")


def train(*overrides: str) -> None:
    """Run `train.py`.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
    done = subprocess.run([sys.executable, "train.py", *overrides], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"train.py {' '.join(overrides)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def cpu_seconds() -> float:
    """CPU time of the runs so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check(work: Path, model: str, bits: int) -> None:
    """Both stages of one row."""
    row, start = f"ofq_w{bits}a{bits}", work / f"{model}.ckpt"
    name = f"{model}_{row}"
    if not start.exists():
        qat.save(timm.create_model(MODELS[model], num_classes=CLASSES), start)
    began, cpu_began = time.monotonic(), cpu_seconds()
    train(f"experiment={row}", f"model={model}", f"data.root={work / 'images'}", f"ckpt={start}", f"run_dir={work / name}", *SMALL)
    first = work / name / "checkpoints" / "last.ckpt"
    second = (f"ckpt={first}", f"teacher.ckpt={start}", f"run_dir={work / name}_cga")
    train(f"experiment={row}_cga", f"model={model}", f"data.root={work / 'images'}", *second, *SMALL)
    print(f"{name:20} both stages ran  {time.monotonic() - began:5.0f} s, {cpu_seconds() - cpu_began:5.0f} s of CPU", flush=True)


if __name__ == "__main__":
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images")
        for row in sys.argv[1:] or [f"{model}:{bits}" for model in MODELS for bits in (2, 3, 4)]:
            checked, _, width = row.partition(":")
            check(Path(folder), checked, int(width))
    print(f"all in {time.monotonic() - started:.0f} s")
