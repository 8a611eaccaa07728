"""LayerNorm in integer arithmetic on power-of-two factors. Source: FQ-ViT (arXiv 2111.13824)."""

from __future__ import annotations

import torch
from torch import Tensor

# A multiplier is a whole number of 8 bits, shifted right by up to 31.
_PLACES = 7
_MOST_SHIFTS = 31


@torch.no_grad()
def integer_layer_norm(
    x: Tensor, in_scale: Tensor, out_scale: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """LayerNorm over the last dimension of integers that have a scale per channel, rounded to the output's scale; no epsilon, no gradient.

    Args:
        x: (..., C), multiples of `in_scale`.
        in_scale: (C,), each the smallest of them times a power of two (`ptf`).
        out_scale: (C,) or one element: step of the result, which is not clipped.
        weight: (C,).
        bias: (C,).

    Returns:
        (..., C) float32, multiples of `out_scale`. A constant row gives the bias.
    """
    smallest = in_scale.min()
    codes = (x.float() / in_scale).round() * (in_scale / smallest).round()
    mean = codes.mean(-1, keepdim=True) * smallest
    count = x.shape[-1]
    spread = (
        (count * codes.square().sum(-1, keepdim=True) - codes.sum(-1, keepdim=True).square())
        .clamp(min=0)
        .sqrt()
    )
    std = smallest / count * spread
    factor = torch.where(std > 0, smallest / std, 0.0) * weight / out_scale
    shifts = (_PLACES - factor.abs().log2().floor()).clamp(0, _MOST_SHIFTS)
    power = torch.exp2(shifts)
    multiplier = (factor.abs() * power).floor().clamp(0, 2 ** (_PLACES + 1) - 1)
    offset = ((bias - torch.where(std > 0, mean / std, 0.0) * weight) / out_scale * power).round()
    return ((factor.sign() * multiplier * codes + offset) / power).round() * out_scale
