"""The task's own loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from qat.losses.compose import LossTerm, StepContext
from qat.utils.validate import check_number


class CrossEntropy(LossTerm):
    """Cross-entropy of the prediction, in float32; targets are class ids or probabilities.

    Args:
        label_smoothing: mass moved from the target to all classes, in [0, 1).
        weight: factor in the sum.
    """

    def __init__(self, label_smoothing: float = 0.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_number("loss.label_smoothing", label_smoothing, 0, below=1)
        self.label_smoothing = label_smoothing

    def forward(self, step: StepContext) -> Tensor:
        """Scalar."""
        return F.cross_entropy(step.prediction.float(), step.target, step.class_weights, label_smoothing=self.label_smoothing)
