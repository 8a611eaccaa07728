"""OFQ's training loss: hard labels for the class head, the teacher's class head for the distillation head."""

from __future__ import annotations

from torch import Tensor

from qat.functional.distillation import distillation_loss
from qat.losses.compose import LossTerm, StepContext
from qat.utils.validate import check_number


class Distillation(LossTerm):
    """Hard cross-entropy and soft cross-entropy to the teacher, equal parts in OFQ; a net with one head gets both on it.

    Args:
        label_smoothing: of the hard part, mass moved from the target to all classes, in [0, 1).
        weight: factor in the sum.
        hard_weight: of the hard part beside the soft one, 0 or more; at 0 the teacher alone is followed, and the class head of a net that
            has a distillation head learns nothing.
        temperature: of both distributions of the soft part, above 0; 1 in OFQ.
    """

    needs_teacher = True

    def __init__(self, label_smoothing: float = 0.0, weight: float = 1.0, hard_weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(weight)
        check_number("loss.label_smoothing", label_smoothing, 0, below=1)
        check_number("loss.hard_weight", hard_weight, 0)
        check_number("loss.temperature", temperature, 0, above=True)
        self.label_smoothing = label_smoothing
        self.hard_weight = hard_weight
        self.temperature = temperature

    def forward(self, step: StepContext) -> Tensor:
        """Scalar."""
        if step.teacher_logits is None:
            raise ValueError("Distillation needs teacher logits; build QATModule with a teacher")
        cls, dist = step.heads
        settings = {"label_smoothing": self.label_smoothing, "hard_weight": self.hard_weight, "temperature": self.temperature}
        return distillation_loss(cls, dist, step.teacher_logits, step.target, class_weights=step.class_weights, **settings)
