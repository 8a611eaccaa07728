"""Distillation loss of OFQ (arXiv 2302.02210) and DeiT: hard labels for the class head, the teacher for the distillation head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the batch of -T^2 sum softmax(teacher / T) * log_softmax(student / T), in float32 (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        logits: (B, K) of the student.
        teacher_logits: (B, K).
        temperature: T, above 0. Above 1 the classes that the teacher holds for unlikely say more; T^2 keeps the size of the gradient.

    Returns:
        Scalar, float32.
    """
    return temperature**2 * F.cross_entropy(
        logits.float() / temperature, (teacher_logits.float() / temperature).softmax(-1)
    )


def distillation_loss(
    student_cls: Tensor,
    student_dist: Tensor,
    teacher_cls: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    hard_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """hard_weight * CE(student_cls, target) + CE(student_dist, softmax(teacher_cls)); equal weights and temperature 1 in OFQ.

    Args:
        student_cls: (B, K) logits of the class head.
        student_dist: (B, K) logits of the distillation head; the same tensor for a net with one head.
        teacher_cls: (B, K) logits of the teacher.
        target: (B,) class ids or (B, K) probabilities.
        label_smoothing: mass moved from the target to all classes, in [0, 1); the teacher's probabilities stay.
        hard_weight: of the first part; at 0 labels are not looked at.
        temperature: of the second part, above 0 (`soft_cross_entropy`).

    Returns:
        Scalar, float32.
    """
    soft = soft_cross_entropy(student_dist, teacher_cls, temperature)
    if not hard_weight:
        return soft
    hard = F.cross_entropy(student_cls.float(), target, label_smoothing=label_smoothing)
    return hard_weight * hard + soft


def feature_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over features and images of |s - t|^2 / var(t), both over an image: 1 is as far as the teacher's mean is, whatever its scale.

    Of an image alone, so that a batch and its parts agree.

    Args:
        student: features (B, ...), as of the blocks of a net.
        teacher: as many, of the same shapes; no gradient goes there.

    Returns:
        Scalar, float32.
    """
    tiny = torch.finfo(torch.float32).eps
    each = []
    for own, followed in zip(student, teacher, strict=True):
        t = followed.detach().float().flatten(1)
        error = (own.float().flatten(1) - t).square().mean(1)
        each.append((error / t.var(1, correction=0).clamp(min=tiny)).mean())
    return torch.stack(each).mean()
