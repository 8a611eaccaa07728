"""OFQ's training loss: hard labels for the class head, the teacher's class head for the distillation head."""

from __future__ import annotations

from torch import Tensor

from qat.functional.distillation import distillation_loss
from qat.losses.compose import LossTerm
from qat.losses.context import StepContext


class Distillation(LossTerm):
    """Equal parts of hard cross-entropy and soft cross-entropy to the teacher; a net with one head gets both on it."""

    needs_teacher = True

    def forward(self, step: StepContext) -> Tensor:
        """Scalar."""
        if step.teacher_logits is None:
            raise ValueError("Distillation needs teacher logits; build QATModule with a teacher")
        cls, dist = step.heads
        return distillation_loss(cls, dist, step.teacher_logits, step.target)
