"""Means of losses over images."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import MeanMetric


class MeanLoss(MeanMetric):
    """Mean over images of values that are each a mean over a batch; NaN as soon as one of them is.

    torchmetrics' own leaves such batches out, or, told not to look for them, all weights; and it copies each weight to the device, which
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
