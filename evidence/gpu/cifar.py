"""CIFAR-10 on a device: decoded once, held as whole tensors, shuffled, flipped and shifted there by seed and epoch alone."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qat.utils.files import read_torch, write_torch

VALIDATION, CLASSES, SIZE = 5000, 10, 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Part = tuple[Tensor, Tensor]


def _pixels(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def decode(folder: Path, split: str) -> Part:
    """Images (N, 3, 32, 32) in bytes and their labels, from the parquet files whose names begin with `split`.

    Raises:
        FileNotFoundError: there are none.
    """
    import pyarrow.parquet as pq  # not needed once images are decoded

    files = sorted(folder.rglob(f"{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"--train {folder}: must hold {split}*.parquet of CIFAR-10")
    columns = [pq.read_table(file).to_pydict() for file in files]
    encoded = [cell["bytes"] for one in columns for cell in one.get("img", one.get("image"))]
    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        images = np.stack(list(pool.map(_pixels, encoded, chunksize=500)))
    labels = [label for one in columns for label in one["label"]]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def prepare(folder: Path, kept: Path, *, dry_run: bool) -> None:
    """Decode both splits, once.

    Args:
        folder: of the parquet files.
        kept: the file of tensors to write.
        dry_run: a few random images instead.
    """
    if kept.exists():
        return
    if dry_run:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (40, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        parts = {"train": (images[:32], torch.arange(32) % CLASSES), "test": (images[32:], torch.arange(8) % CLASSES)}
    else:
        parts = {split: decode(folder, split) for split in ("train", "test")}
    write_torch(kept, parts)


class Cifar:
    """Images of all parts on a device. The validation images are the same for every run: the last of the training images, shuffled.

    Args:
        kept: what `prepare` wrote.
        device: where to.
    """

    def __init__(self, kept: Path, device: torch.device) -> None:
        parts = read_torch(kept)
        images, labels = parts["train"]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held_out = min(VALIDATION, len(images) // 4)
        chosen = {"train": order[:-held_out], "val": order[-held_out:]}
        self.parts: dict[str, Part] = {name: (images[at].to(device), labels[at].to(device)) for name, at in chosen.items()}
        self.parts["test"] = parts["test"][0].to(device), parts["test"][1].to(device)
        self.device = device
        self._mean, self._std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))

    def _normalized(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std

    def batches(self, name: str, size: int) -> Iterator[Part]:
        """All images of a part in their order."""
        images, labels = self.parts[name]
        for start in range(0, len(images), size):
            yield self._normalized(images[start : start + size]), labels[start : start + size]

    def epoch(self, seed: int, epoch: int, size: int, shift: int) -> Iterator[Part]:
        """Training batches of one size, what is left over is not used; order, flips and shifts are functions of seed and epoch.

        Args:
            seed: of the run.
            epoch: from 0.
            size: images of a batch.
            shift: pixels that an image is moved by at most, in both directions.
        """
        images, labels = self.parts["train"]
        generator = torch.Generator(self.device).manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(images), generator=generator, device=self.device)
        for at in order[: len(order) // size * size].split(size):
            yield augmented(self._normalized(images[at]), shift, generator), labels[at]


def augmented(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Half of the images flipped, each moved by up to `shift` pixels, with zeros from outside."""
    n, device = len(images), images.device
    flip = torch.rand(n, generator=generator, device=device) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    if not shift:
        return images
    down, right = torch.randint(2 * shift + 1, (2, n, 1), generator=generator, device=device)
    row, column = (torch.arange(images.shape[i], device=device) + move for i, move in ((2, down), (3, right)))
    padded = F.pad(images, [shift] * 4).permute(0, 2, 3, 1)
    which = torch.arange(n, device=device).view(-1, 1, 1)
    return padded[which, row.unsqueeze(2), column.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()
