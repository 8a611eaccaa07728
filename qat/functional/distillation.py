"""Distillation losses: the loss of OFQ (arXiv 2302.02210) and DeiT, and a feature distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the batch of -T^2 sum softmax(teacher / T) * log_softmax(student / T).

    Source: Hinton et al. 2015, arXiv 1503.02531.

    Args:
        logits: (B, K), logits of the student.
        teacher_logits: (B, K), logits of the teacher.
        temperature: T, above 0. Above 1, classes that the teacher finds unlikely count more; the
            factor T^2 preserves the size of the gradient.

    Returns:
        Scalar, float32.
    """
    teacher_probs = (teacher_logits.float() / temperature).softmax(-1)
    return temperature**2 * F.cross_entropy(logits.float() / temperature, teacher_probs)


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
    """hard_weight * CE(student_cls, target) + `soft_cross_entropy`(student_dist, teacher_cls).

    The class head learns from the labels, the distillation head from the teacher. OFQ uses equal
    weights and temperature 1.

    Args:
        student_cls: (B, K) logits of the class head.
        student_dist: (B, K) logits of the distillation head; for a student with one head, pass
            `student_cls`.
        teacher_cls: (B, K) logits of the teacher.
        target: (B,) class ids or (B, K) probabilities.
        label_smoothing: mass moved from the target to all classes, in [0, 1); the teacher's
            probabilities are not smoothed.
        hard_weight: factor on the cross-entropy to the labels; at 0, labels are not read.
        temperature: T of the cross-entropy to the teacher (see `soft_cross_entropy`), above 0.

    Returns:
        Scalar, float32.
    """
    soft = soft_cross_entropy(student_dist, teacher_cls, temperature)
    if not hard_weight:
        return soft
    hard = F.cross_entropy(student_cls.float(), target, label_smoothing=label_smoothing)
    return hard_weight * hard + soft


def feature_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean of |s - t|^2 / var(t) over features and images.

    Here |s - t|^2 is the mean square over the entries of one image, and var(t) the variance over
    these entries, at least float32 eps. Above this minimum, a student that outputs the teacher's
    mean for each image has distance 1. Images do not mix, so the distance of a batch is the mean
    distance of its images.

    Args:
        student: features (B, ...), such as outputs of the blocks of a net.
        teacher: features of the teacher, in the same number and shapes as those of the student; no
            gradient flows into them.

    Returns:
        Scalar, float32.
    """
    eps = torch.finfo(torch.float32).eps
    distances = []
    for student_feature, teacher_feature in zip(student, teacher, strict=True):
        target = teacher_feature.detach().float().flatten(1)
        error = (student_feature.float().flatten(1) - target).square().mean(1)
        variance = target.var(1, correction=0).clamp(min=eps)
        distances.append((error / variance).mean())
    return torch.stack(distances).mean()
