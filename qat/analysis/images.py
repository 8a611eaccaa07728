"""Images of a split, decoded once and kept in memory: what every evaluation of an analysis looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        batches: images (B, C, H, W) as the net sees them, and class ids (B,), both on one device.
        split: where they come from.
    """

    batches: Sequence[Batch]
    split: str

    @property
    def n_images(self) -> int:
        """Images in all batches."""
        return sum(len(target) for _, target in self.batches)

    @torch.no_grad()
    def score(self, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Top-1 in percent, and mean cross-entropy.

        Args:
            predict: maps images to logits (B, K).
        """
        sums = []
        for images, target in self.batches:
            logits = predict(images).float()
            correct = (logits.argmax(-1) == target).sum().double()
            sums.append(torch.stack([correct, F.cross_entropy(logits, target, reduction="sum").double()]))
        n_correct, loss = torch.stack(sums).sum(0).tolist()
        return {"top1": 100 * n_correct / self.n_images, "loss": loss / self.n_images}
