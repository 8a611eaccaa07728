"""Floats of 4 or 8 bits in blocks that share a scale. Sources: OCP Microscaling Formats 1.0 (MXFP4, MXFP8); NVIDIA's NVFP4.

Blocks lie along the last dimension; a short one at its end is a block of its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.functional.ste import TINY, in_dtype

# Largest finite value of E4M3, and the exponents of float32 beside its bias.
_E4M3_MAX = 448.0
_EXPONENTS, _MANTISSA_BITS, _BIAS = 0x7F800000, 23, 127
# By code.
_E2M1 = [sign * size for sign in (1.0, -1.0) for size in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


class BlockFormat(NamedTuple):
    """A float without infinities, and how its scales are made.

    Attributes:
        bits: of a code: sign, exponent, mantissa.
        mantissa: bits of the mantissa.
        lowest: exponent of its smallest normal value.
        highest: its largest value.
        block: values that share a scale.
        two_level: a block's scale is an E4M3 value times one number of the tensor; else it is a power of two.
    """

    bits: int
    mantissa: int
    lowest: int
    highest: float
    block: int
    two_level: bool = False


# By name of a quantizer and bits.
BLOCK_FORMATS = {
    ("mxfp", 4): BlockFormat(4, 1, 0, 6.0, 32),
    ("mxfp", 8): BlockFormat(8, 3, -6, _E4M3_MAX, 32),
    ("nvfp4", 4): BlockFormat(4, 1, 0, 6.0, 16, two_level=True),
}
_SCALES = BLOCK_FORMATS["mxfp", 8]


def _power_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above |x|, float32: 0 for what is less than a normal number, infinity for infinity and NaN."""
    return (x.view(torch.int32) & _EXPONENTS).view(torch.float32)


def nearest_float(u: Tensor, form: BlockFormat) -> Tensor:
    """The nearest value of a format, half to even, saturating at the largest; float32, the shape of `u`. NaN passes."""
    u = u.clamp(-form.highest, form.highest)
    step = _power_below(u).clamp(min=2.0**form.lowest) * 2.0**-form.mantissa
    return (u / step).round() * step


def tensor_scale(x: Tensor, form: BlockFormat) -> Tensor | None:
    """The number t = max|x| / (6 * 448) of a format of two levels, a scalar in float32; None for others."""
    if not form.two_level:
        return None
    x = x.detach() if x.numel() else x.new_zeros(1)
    # The same number: one is a sixth of the other's time on a CPU, and a launch more on CUDA.
    largest = (
        torch.linalg.vector_norm(x, torch.inf)
        if x.is_cuda
        else torch.stack(x.aminmax()).abs().amax()
    )
    return largest.float() / (form.highest * _E4M3_MAX)


def _factors(blocks: Tensor, form: BlockFormat, t: Tensor | None) -> Tensor:
    """What each block's scale is made of t: E4M3 values; where there is no t, the scale, a power of two. (..., k, 1)."""
    largest = blocks.abs().amax(-1, keepdim=True)
    if t is not None:
        return nearest_float(largest / form.highest / torch.where(t == 0, torch.inf, t), _SCALES)
    exponent = int(math.log2(form.highest))
    scale = (_power_below(largest) * 2.0**-exponent).clamp(max=2.0 ** (_BIAS + 1 - exponent))
    return torch.where(largest.isnan(), largest, torch.where(scale < TINY, 0.0, scale))


def _blocks(x: Tensor, form: BlockFormat) -> Tensor:
    """(..., k, n) for (..., up to k * n), with zeros behind a short one."""
    return nn.functional.pad(x, (0, -x.shape[-1] % form.block)).unflatten(-1, (-1, form.block))


def _scaled(x: Tensor, form: BlockFormat, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of `_blocks`: the values over their scales, 0 where a scale is 0; the scales; what these are made of t."""
    blocks = _blocks(x.float(), form)
    factors = _factors(blocks, form, t)
    scales = factors if t is None else factors * t
    return blocks / torch.where(scales == 0, torch.inf, scales), scales, factors


def round_blocks(
    x: Tensor, form: BlockFormat, t: Tensor | None, grad: Tensor | None = None
) -> Tensor:
    """The nearest value of x / s, times s, for the scale s of each block; or gradients, zero where |x / s| is above the largest value.

    A power of two is s = 2^(floor(log2(max|block|)) - e), e = exponent of the largest value; with two levels it is
    E4M3(max|block| / 6 / t) * t. A block of zeros, or whose s is too small for a normal number, becomes zeros; one with a NaN is NaN.

    Args:
        x: (..., n), any float dtype; computed in float32.
        form: one of `BLOCK_FORMATS`.
        t: `tensor_scale` of `x`.
        grad: None, or gradients of the rounded values, which are then what is given for `x`.

    Returns:
        The shape and dtype of `x`.
    """
    u, scales, _ = _scaled(x, form, t)
    out = (
        nearest_float(u, form) * scales
        if grad is None
        else torch.where(u.abs() > form.highest, 0.0, _blocks(grad, form))
    )
    # Rounded before it is flat: a compiler makes one pass of what has one shape.
    return in_dtype(out, x.dtype).flatten(-2)[..., : x.shape[-1]]


class BlockFloatFunction(torch.autograd.Function):
    """Keeps the input and t for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, t: Tensor | None, form: BlockFormat) -> Tensor:
        """`round_blocks`."""
        return round_blocks(x, form, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """What backward needs."""
        x, t, ctx.form = inputs
        ctx.save_for_backward(x, t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """`round_blocks` of the gradient; can be differentiated once more."""
        x, t = ctx.saved_tensors
        return round_blocks(x, ctx.form, t, grad), None, None


def block_float(x: Tensor, form: BlockFormat) -> Tensor:
    """Quantize blocks along the last dimension of `x`: `round_blocks` with its `tensor_scale`.

    Args:
        x: (..., n), any float dtype; computed in float32.
        form: one of `BLOCK_FORMATS`.

    Returns:
        The shape and dtype of `x`. Its gradient passes, and is zero for values that saturate.
    """
    return BlockFloatFunction.apply(x, tensor_scale(x, form), form)


def float_place(u: Tensor, form: BlockFormat) -> Tensor:
    """Place of values in units of their scale among those of a format, the smallest above zero at 1; its sign is that of `u`."""
    power = _power_below(u).clamp(min=2.0**form.lowest)
    exponent = (power.view(torch.int32) >> _MANTISSA_BITS) - _BIAS
    return torch.copysign((u.abs() / power + (exponent - form.lowest)) * 2**form.mantissa, u)


def block_float_codes(x: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of `block_float`: sign, exponent and mantissa as bits; and its scales.

    Returns:
        uint8, the shape of `x` (0 for NaN, whose scale is NaN); (..., ceil(n / block)) float32, of which each block's scale is made by
        multiplying with t; t, or None where they are the scales.
    """
    t = tensor_scale(x, form)
    u, _, factors = _scaled(x, form, t)
    place = float_place(nearest_float(u, form), form).nan_to_num()
    codes = (place.abs() + place.signbit() * 2 ** (form.bits - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., : x.shape[-1]], factors.flatten(-2), t


def float_values(codes: Tensor, form: BlockFormat) -> Tensor:
    """The values of codes in units of their scale, float32."""
    if form.bits == _SCALES.bits:
        return codes.view(torch.float8_e4m3fn).float()
    return torch.tensor(_E2M1, dtype=torch.float32, device=codes.device)[codes.int()]
