"""Images of a split, decoded once and kept in memory: what every evaluation of an analysis looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        batches: images (B, C, H, W) as the net sees them, and class ids (B,), both on one device.
        split: where they come from.
        mean, std: per channel: how the images were normalised, for those who want pixels from 0 to 1.
    """

    batches: Sequence[Batch]
    split: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @property
    def n_images(self) -> int:
        """Images in all batches."""
        return sum(len(target) for _, target in self.batches)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(images.nbytes + target.nbytes for images, target in self.batches)

    @torch.no_grad()
    def score(self, predict: Callable[[Tensor], Tensor], change: Change | None = None) -> dict[str, float]:
        """Top-1 in percent, and mean cross-entropy.

        Args:
            predict: maps images to logits (B, K).
            change: what is done to images (B, C, H, W) first.
        """
        sums = [self._sums(predict(images if change is None else change(images)).float(), target) for images, target in self.batches]
        correct, loss = torch.stack(sums).sum(0).tolist()
        return {"top1": 100 * correct / self.n_images, "loss": loss / self.n_images}

    @staticmethod
    def _sums(logits: Tensor, target: Tensor) -> Tensor:
        correct = (logits.argmax(-1) == target).sum().double()
        return torch.stack([correct, F.cross_entropy(logits, target, reduction="sum").double()])
