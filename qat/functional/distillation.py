"""Distillation loss of OFQ (arXiv 2302.02210) and DeiT: hard labels for the class head, the teacher for the distillation head."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over the batch of -sum softmax(teacher) * log_softmax(student), temperature 1, in float32; logits (B, K)."""
    return F.cross_entropy(logits.float(), teacher_logits.float().softmax(-1))


def distillation_loss(
    student_cls: Tensor,
    student_dist: Tensor,
    teacher_cls: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    hard_weight: float = 1.0,
) -> Tensor:
    """hard_weight * CE(student_cls, target) + CE(student_dist, softmax(teacher_cls)); equal weights in OFQ.

    Args:
        student_cls: (B, K) logits of the class head.
        student_dist: (B, K) logits of the distillation head; the same tensor for a net with one head.
        teacher_cls: (B, K) logits of the teacher.
        target: (B,) class ids or (B, K) probabilities.
        label_smoothing: mass moved from the target to all classes, in [0, 1); the teacher's probabilities stay.
        hard_weight: of the first part; at 0 labels are not looked at.

    Returns:
        Scalar, float32.
    """
    soft = soft_cross_entropy(student_dist, teacher_cls)
    if not hard_weight:
        return soft
    return hard_weight * F.cross_entropy(student_cls.float(), target, label_smoothing=label_smoothing) + soft
