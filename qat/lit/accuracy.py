"""Accuracy and mean loss: metrics for a trainer, and `evaluate`, which needs no trainer."""

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
    """torchmetrics' accuracy in percent, as in published results."""

    def compute(self) -> Tensor:
        """Accuracy in percent."""
        return 100 * super().compute()


def accuracy_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Metrics `top1` and `top5`, in percent; with 2 to 4 classes, all of them count for `top5`."""
    metrics = {}
    for k in (1, 5):
        top_k = min(k, num_classes)
        metrics[f"top{k}"] = PercentAccuracy(num_classes, top_k=top_k, average="micro")
    return MetricCollection(metrics, prefix=prefix)  # type: ignore[arg-type]


class MeanLoss(MeanMetric):
    """Mean over images, computed from the means of batches; NaN if the mean of a batch is NaN.

    torchmetrics' own `update` leaves out batches with NaN or, with its check off, ignores weights.
    torchmetrics also copies each weight to the device, and so waits for the previous step.
    """

    def update(self, value: Tensor, weight: int) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            value: (), mean over the batch.
            weight: number of images of the batch.
        """
        self.mean_value += value.to(self.mean_value.dtype) * weight
        self.weight += weight


def mean_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy, (), of logits (B, K); NaN if any logit is not finite."""
    # The second term is 0, or NaN if any logit is not finite; the first may ignore -inf.
    return F.cross_entropy(logits, target) + (0 * logits).sum()


def check_logits(loss: float, subject: str) -> None:
    """Raise `UsageError` if `loss` is NaN, which means that a logit is not finite.

    Args:
        loss: a number that is NaN if any logit is not finite, such as `mean_cross_entropy`.
        subject: start of the message, such as a setting with its value.
    """
    if math.isnan(loss):
        raise UsageError(
            f"{subject}: the model's logits contain NaN or infinity; must be finite "
            "(trainer.precision=32-true has the widest range)"
        )


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor], batches: Iterable, num_classes: int, device: torch.device
) -> dict[str, float]:
    """Top-1 and top-5 in percent, and mean cross-entropy.

    Args:
        predict: maps images (B, C, H, W) to logits (B, K).
        batches: pairs (images, class ids).
        num_classes: K.
        device: the device of `predict`.

    Returns:
        `top1`, `top5` and `loss`, which is NaN without batches or if the loss of a batch is NaN.
    """
    metrics = accuracy_metrics(num_classes, "").to(device)
    mean_loss = MeanLoss().to(device)
    for images, target in batches:
        logits = predict(images.to(device)).float()
        classes = target.to(device)
        metrics.update(logits, classes)
        mean_loss.update(mean_cross_entropy(logits, classes), weight=len(images))
    results = {name: float(value) for name, value in metrics.compute().items()}
    return results | {"loss": float(mean_loss.compute())}
