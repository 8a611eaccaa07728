"""Distillation of what blocks give. After the hints of FitNets (arXiv 1412.6550); OFQ follows a teacher's logits alone."""

from __future__ import annotations

from torch import Tensor

from qat.functional.distillation import feature_distance
from qat.functional.oscillation import cosine_between
from qat.losses.compose import LossTerm, StepContext
from qat.utils.validate import check_choice, check_number

WHICH = ("all", "last")
SCHEDULES = ("constant", "cosine")


class FeatureDistillation(LossTerm):
    """Distance of what blocks give from what the teacher's give; see `feature_distance`.

    Args:
        weight: factor in the sum.
        blocks: `all`, each beside the same block of the teacher, or the `last` alone.
        schedule: `constant`, or `cosine`: the factor falls to 0 at the end of the run.
    """

    needs_teacher = True

    def __init__(self, weight: float = 1.0, blocks: str = "all", schedule: str = "constant") -> None:
        check_number("loss.features", weight, 0)
        check_choice("loss.features_blocks", blocks, WHICH)
        check_choice("loss.features_schedule", schedule, SCHEDULES)
        super().__init__(weight)
        self.blocks = blocks
        self.schedule = schedule

    def forward(self, step: StepContext) -> Tensor:
        """Scalar, on the part of `weight` that is in force."""
        if not step.teacher_features:
            raise ValueError("FeatureDistillation needs what the teacher's blocks give; build QATModule with a teacher that has blocks")
        share = 1.0 if self.schedule == "constant" else cosine_between(1.0, 0.0, step.progress)
        return share * feature_distance(step.features, step.teacher_features)
