"""LayerNorm in integer arithmetic, for one scale or channel scales that differ by powers of two.

Source: FQ-ViT (arXiv 2111.13824).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Multipliers are 8-bit integers, at least 2^7 if the shift allows this. Products are shifted right
# by up to 31 bits.
_MULTIPLIER_EXPONENT = 7
_MAX_SHIFT = 31


@torch.no_grad()
def integer_layer_norm(
    x: Tensor, in_scale: Tensor, out_scale: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Integer LayerNorm over the last dimension.

    There is no epsilon and no gradient.

    Args:
        x: (..., C), values that are multiples of `in_scale`.
        in_scale: one element, or (C,): the smallest scale times powers of two (`ptf_scale`).
        out_scale: one element or (C,), the step size of the result. The result is not clipped.
        weight: (C,).
        bias: (C,).

    Returns:
        (..., C) float32, multiples of `out_scale`. A constant row becomes the rounded bias.
    """
    smallest = in_scale.min()
    channel_powers = (in_scale / smallest).round()
    codes = (x.float() / in_scale).round() * channel_powers
    mean = codes.mean(-1, keepdim=True) * smallest
    count = x.shape[-1]
    sum_of_squares = codes.square().sum(-1, keepdim=True)
    squared_sum = codes.sum(-1, keepdim=True).square()
    count_times_std = (count * sum_of_squares - squared_sum).clamp(min=0).sqrt()
    std = smallest / count * count_times_std
    inverse_std = torch.where(std > 0, smallest / std, 0.0)
    factor = inverse_std * weight / out_scale
    shifts = (_MULTIPLIER_EXPONENT - factor.abs().log2().floor()).clamp(0, _MAX_SHIFT)
    power = torch.exp2(shifts)
    multiplier = (factor.abs() * power).floor().clamp(0, 2 ** (_MULTIPLIER_EXPONENT + 1) - 1)
    relative_mean = torch.where(std > 0, mean / std, 0.0)
    offset = ((bias - relative_mean * weight) / out_scale * power).round()
    scaled_codes = factor.sign() * multiplier * codes
    out_codes = ((scaled_codes + offset) / power).round()
    return out_codes * out_scale
