"""Accuracies and mean losses over images; of anything that maps images to logits, without a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from qat.errors import UsageError


class PercentAccuracy(MulticlassAccuracy):
    """torchmetrics' accuracy times 100: the unit of every published row."""

    def compute(self) -> Tensor:
        """Accuracy in percent."""
        return 100 * super().compute()


def accuracy_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Top-1 and top-5 accuracy in percent (top-k with all classes where there are fewer than five)."""
    metrics = {
        f"top{k}": PercentAccuracy(num_classes, top_k=min(k, num_classes), average="micro")
        for k in (1, 5)
    }
    return MetricCollection(metrics, prefix=prefix)  # type: ignore[arg-type]


class MeanLoss(MeanMetric):
    """Mean over images of values that are each a mean over a batch; NaN as soon as one of them is.

    torchmetrics' own leaves such batches out, or, set not to look for them, all weights; and it copies each weight to the device, which
    waits for the step before.
    """

    def update(self, value: Tensor, weight: int) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            value: (), its mean.
            weight: how many images it has.
        """
        self.mean_value += value.to(self.mean_value.dtype) * weight
        self.weight += weight


def mean_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of a batch, (); NaN where a logit is not finite, also one that the loss does not depend on."""
    return F.cross_entropy(logits, target) + (0 * logits).sum()


def check_logits(loss: float, what: str) -> None:
    """Raise `UsageError` if `loss`, a mean of `mean_cross_entropy`, is NaN.

    Args:
        loss: of all images.
        what: was evaluated, for the message.
    """
    if math.isnan(loss):
        widest = "trainer.precision=32-true has the widest range"
        raise UsageError(
            f"{what}: the model's logits hold NaN or infinity; must be finite ({widest})"
        )


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor], batches: Iterable, num_classes: int, device: torch.device
) -> dict[str, float]:
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
        loss.update(mean_cross_entropy(logits, classes), weight=len(images))
    return {
        name: float(value) for name, value in {**metrics.compute(), "loss": loss.compute()}.items()
    }
