"""Terms on outputs: cross-entropy, and distillation from logits or from outputs of blocks.

Sources: OFQ, arXiv 2302.02210, for distillation from logits; `FeatureDistillation`, which OFQ does
not have, follows the hints of FitNets (arXiv 1412.6550).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from qat.errors import UsageError
from qat.functional.distillation import distillation_loss, feature_distance
from qat.functional.oscillation import cosine_between
from qat.losses.compose import LossTerm, StepContext
from qat.utils.validate import check_choice, check_number


class CrossEntropy(LossTerm):
    """Cross-entropy of the prediction, in float32; targets are class ids or probabilities.

    Args:
        label_smoothing: probability mass moved from the target to all classes, in [0, 1).
        weight: factor in the sum.
    """

    def __init__(self, label_smoothing: float = 0.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        check_number("loss.label_smoothing", label_smoothing, 0, below=1)
        self.label_smoothing = label_smoothing

    def forward(self, step: StepContext) -> Tensor:
        """The loss, a scalar."""
        return F.cross_entropy(
            step.prediction.float(), step.target, label_smoothing=self.label_smoothing
        )


class Distillation(LossTerm):
    """Hard cross-entropy to the labels plus soft cross-entropy to the teacher.

    The class head gets the hard part, the distillation head the soft part; a single head gets both.
    OFQ weights both parts equally.

    Args:
        label_smoothing: probability mass moved from the labels to all classes, in [0, 1).
        weight: factor on the whole term.
        hard_weight: factor on the hard part, 0 or more. At 0 the net only follows the teacher, and
            the class head of a net with a distillation head learns nothing.
        temperature: T of the soft part (see `soft_cross_entropy`), above 0; 1 in OFQ.
    """

    needs_teacher = True

    def __init__(
        self,
        label_smoothing: float = 0.0,
        weight: float = 1.0,
        hard_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_number("loss.label_smoothing", label_smoothing, 0, below=1)
        check_number("loss.hard_weight", hard_weight, 0)
        check_number("loss.temperature", temperature, 0, exclusive_lowest=True)
        self.label_smoothing = label_smoothing
        self.hard_weight = hard_weight
        self.temperature = temperature

    def forward(self, step: StepContext) -> Tensor:
        """The loss, a scalar.

        Raises:
            ValueError: there are no teacher logits.
        """
        if step.teacher_logits is None:
            raise ValueError("Distillation needs teacher logits; build QATModule with a teacher")
        class_logits, distillation_logits = step.heads
        return distillation_loss(
            class_logits,
            distillation_logits,
            step.teacher_logits,
            step.target,
            label_smoothing=self.label_smoothing,
            hard_weight=self.hard_weight,
            temperature=self.temperature,
        )


class FeatureDistillation(LossTerm):
    """`feature_distance` between outputs of the net's blocks and of the teacher's blocks.

    Args:
        weight: factor in the sum.
        blocks: `all` = compare each block with the same block of the teacher; `last` = only the
            last block.
        schedule: `constant`; or `cosine` = the factor falls to 0 at the end of the run.
    """

    needs_teacher = True

    def __init__(
        self, weight: float = 1.0, blocks: str = "all", schedule: str = "constant"
    ) -> None:
        check_number("loss.features", weight, 0)
        check_choice("loss.features_blocks", blocks, ("all", "last"))
        check_choice("loss.features_schedule", schedule, ("constant", "cosine"))
        super().__init__(weight)
        self.blocks = blocks
        self.schedule = schedule

    def forward(self, step: StepContext) -> Tensor:
        """The loss, a scalar, multiplied by the schedule.

        Raises:
            UsageError: the net has no blocks, or the blocks of net and teacher differ in number or
                in output shapes.
        """
        shapes = [tuple(feature.shape[1:]) for feature in step.features]
        teacher_shapes = [tuple(feature.shape[1:]) for feature in step.teacher_features]
        if not shapes:
            raise UsageError(f"loss.features={self.weight}: must be 0, as the model has no blocks")
        if shapes != teacher_shapes:
            raise UsageError(
                f"loss.features: the blocks of the model return {shapes}, the blocks of the "
                f"teacher {teacher_shapes}; must be the same shapes"
            )
        factor = 1.0
        if self.schedule == "cosine":
            factor = cosine_between(1.0, 0.0, step.progress)
        return factor * feature_distance(step.features, step.teacher_features)
