"""Distillation of what blocks give. After the hints of FitNets (arXiv 1412.6550); OFQ follows a teacher's logits alone."""

from __future__ import annotations

from torch import Tensor

from qat.functional.distillation import feature_distance
from qat.losses.compose import LossTerm
from qat.losses.context import StepContext
from qat.spec import check_choice, check_number

WHICH = ("all", "last")


class FeatureDistillation(LossTerm):
    """Distance of what blocks give from what the teacher's give; see `feature_distance`.

    Args:
        weight: factor in the sum.
        blocks: `all`, each beside the same block of the teacher, or the `last` alone.
    """

    needs_teacher = True

    def __init__(self, weight: float = 1.0, blocks: str = "all") -> None:
        check_number("loss.features", weight, 0)
        check_choice("loss.features_blocks", blocks, WHICH)
        super().__init__(weight)
        self.blocks = blocks

    def forward(self, step: StepContext) -> Tensor:
        """Scalar."""
        if not step.teacher_features:
            raise ValueError("FeatureDistillation needs what the teacher's blocks give; build QATModule with a teacher that has blocks")
        return feature_distance(step.features, step.teacher_features)
