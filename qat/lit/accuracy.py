"""Accuracy of anything that maps images to logits, without a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.lit.means import MeanLoss
from qat.lit.module import accuracy_metrics


@torch.no_grad()
def evaluate(predict: Callable[[Tensor], Tensor], batches: Iterable, num_classes: int, device: torch.device) -> dict[str, float]:
    """Top-1 and top-5 in percent, and mean cross-entropy.

    Args:
        predict: maps images (B, C, H, W) to logits (B, K).
        batches: (images, class ids).
        num_classes: K.
        device: where `predict` runs.

    Returns:
        `top1`, `top5`, `loss`; the loss is NaN where that of a batch is.
    """
    metrics, loss = accuracy_metrics(num_classes, "").to(device), MeanLoss().to(device)
    for images, target in batches:
        logits, classes = predict(images.to(device)).float(), target.to(device)
        metrics.update(logits, classes)
        loss.update(F.cross_entropy(logits, classes), weight=len(images))
    return {name: float(value) for name, value in {**metrics.compute(), "loss": loss.compute()}.items()}
