"""Floats of 4 or 8 bits in blocks; the values of a block share a scale.

Blocks are consecutive elements of the last dimension; the last block of a row may be shorter.

Sources: OCP Microscaling Formats 1.0 (MXFP4, MXFP8); NVIDIA's NVFP4.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.functional.ste import TINY, in_dtype

# Largest finite value of E4M3.
E4M3_MAX = 448
# Layout of float32: mask of the exponent, number of bits of the mantissa, and the number added to
# the exponent.
_EXPONENT_MASK = 0x7F800000
_MANTISSA_BITS = 23
_BIAS = 127
# Values of E2M1 by code.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = [*_E2M1_MAGNITUDES, *(-magnitude for magnitude in _E2M1_MAGNITUDES)]


class BlockFormat(NamedTuple):
    """A float format without infinities, and the kind of scale that each block has.

    Attributes:
        bits: number of bits of a code, including sign, exponent and mantissa.
        mantissa: number of bits of the mantissa.
        min_exponent: exponent of the smallest normal value.
        max_value: the largest value.
        block_size: number of values that share a scale.
        two_level: True = the scale of a block is an E4M3 value times one scale for the whole
            tensor, the tensor scale; False = the scale is a power of two.
    """

    bits: int
    mantissa: int
    min_exponent: int
    max_value: float
    block_size: int
    two_level: bool = False


# Formats by quantizer name and number of bits.
BLOCK_FORMATS = {
    ("mxfp", 4): BlockFormat(4, 1, 0, 6.0, 32),
    ("mxfp", 8): BlockFormat(8, 3, -6, E4M3_MAX, 32),
    ("nvfp4", 4): BlockFormat(4, 1, 0, 6.0, 16, two_level=True),
}
_E4M3 = BLOCK_FORMATS["mxfp", 8]


def _power_below(x: Tensor) -> Tensor:
    """The largest power of two up to |x|, float32; 0 for subnormal x, inf for inf and NaN."""
    return (x.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)


def nearest_float(u: Tensor, form: BlockFormat) -> Tensor:
    """Round to the nearest value of a format, ties to even.

    Values outside of the range of the format saturate. NaN stays NaN.

    Args:
        u: any shape, float32.
        form: one of `BLOCK_FORMATS`.

    Returns:
        The shape of `u`, float32.
    """
    u = u.clamp(-form.max_value, form.max_value)
    spacing = _power_below(u).clamp(min=2.0**form.min_exponent) * 2.0**-form.mantissa
    return (u / spacing).round() * spacing


def _largest_magnitude(x: Tensor) -> Tensor:
    """max|x|, computed by the faster operation for the device (six times faster on a CPU)."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, torch.inf)
    return torch.stack(x.aminmax()).abs().amax()


def compute_tensor_scale(x: Tensor, form: BlockFormat) -> Tensor | None:
    """The tensor scale max|x| / (6 * 448), which all blocks share in a two-level format.

    Returns:
        Scalar, float32. None for a format with one level.
    """
    if not form.two_level:
        return None
    x = x.detach() if x.numel() else x.new_zeros(1)
    return _largest_magnitude(x).float() / (form.max_value * E4M3_MAX)


def _block_factors(blocks: Tensor, form: BlockFormat, tensor_scale: Tensor | None) -> Tensor:
    """Scales of blocks (..., k, 1), divided by the tensor scale; without one, powers of two."""
    largest = blocks.abs().amax(-1, keepdim=True)
    if tensor_scale is not None:
        divisor = torch.where(tensor_scale == 0, torch.inf, tensor_scale)
        return nearest_float(largest / form.max_value / divisor, _E4M3)
    exponent = int(math.log2(form.max_value))
    # At this scale an infinite value stays infinite; an infinite scale would make it NaN.
    highest_scale = 2.0 ** (_BIAS + 1 - exponent)
    scale = (_power_below(largest) * 2.0**-exponent).clamp(max=highest_scale)
    scale = torch.where(scale < TINY, 0.0, scale)
    return torch.where(largest.isnan(), largest, scale)


def _split_blocks(x: Tensor, form: BlockFormat) -> Tensor:
    """Reshape (..., up to k * n) to (..., k, n); zeros fill a short block."""
    padded = nn.functional.pad(x, (0, -x.shape[-1] % form.block_size))
    return padded.unflatten(-1, (-1, form.block_size))


class _ScaledBlocks(NamedTuple):
    """Blocks of a tensor in units of their scales.

    Attributes:
        values: (..., k, n), the values divided by the scale of their block; 0 where a scale is 0.
        scales: (..., k, 1), the scales of the blocks.
        factors: (..., k, 1), the result of `_block_factors`.
    """

    values: Tensor
    scales: Tensor
    factors: Tensor


def _scale_blocks(x: Tensor, form: BlockFormat, tensor_scale: Tensor | None) -> _ScaledBlocks:
    """Split a tensor (..., up to k * n) into blocks and divide each by its scale."""
    blocks = _split_blocks(x.float(), form)
    factors = _block_factors(blocks, form, tensor_scale)
    scales = factors if tensor_scale is None else factors * tensor_scale
    divisors = torch.where(scales == 0, torch.inf, scales)
    return _ScaledBlocks(blocks / divisors, scales, factors)


def round_blocks(
    x: Tensor, form: BlockFormat, tensor_scale: Tensor | None, grad: Tensor | None = None
) -> Tensor:
    """Round each block with scale s to s * nearest(x / s), or compute the gradient of the rounding.

    Without a tensor scale, s is the power of two 2^(floor(log2(max|block|)) - e), where e is the
    exponent of the largest value of the format. With a tensor scale t, s is E4M3(max|block| / 6 /
    t) * t. A block becomes zero if all its values are zero, if the power of two is too small for a
    normal float32, or if E4M3 rounds the scale to zero. A block that contains a NaN becomes NaN; in
    a two-level format, a NaN or infinite value makes the whole tensor NaN.

    Args:
        x: (..., n), any float dtype; computed in float32.
        form: one of `BLOCK_FORMATS`.
        tensor_scale: result of `compute_tensor_scale` for `x`.
        grad: gradient of the rounded values, to compute the gradient of `x`; None = round.

    Returns:
        A tensor in the shape and dtype of `x`. Without `grad`, it contains the rounded values. With
        `grad`, it contains the gradient of `x`: `grad`, or zero where |x / s| is above the largest
        value of the format.
    """
    scaled = _scale_blocks(x, form, tensor_scale)
    if grad is None:
        out = nearest_float(scaled.values, form) * scaled.scales
    else:
        saturates = scaled.values.abs() > form.max_value
        out = torch.where(saturates, 0.0, _split_blocks(grad, form))
    # Convert before `flatten`: a compiler fuses operations on equal shapes into one pass.
    out = in_dtype(out, x.dtype)
    return out.flatten(-2)[..., : x.shape[-1]]


class BlockFloatFunction(torch.autograd.Function):
    """`round_blocks` with its gradient; the input and the tensor scale are saved for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tensor_scale: Tensor | None, form: BlockFormat) -> Tensor:
        """Round the blocks."""
        return round_blocks(x, form, tensor_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Save the inputs."""
        x, tensor_scale, form = inputs
        ctx.form = form
        ctx.save_for_backward(x, tensor_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the input; can be differentiated once more."""
        x, tensor_scale = ctx.saved_tensors
        return round_blocks(x, ctx.form, tensor_scale, grad), None, None


def block_float(x: Tensor, form: BlockFormat) -> Tensor:
    """Quantize blocks along the last dimension of `x`: `round_blocks` with its tensor scale.

    Args:
        x: (..., n), any float dtype; computed in float32.
        form: one of `BLOCK_FORMATS`.

    Returns:
        The shape and dtype of `x`. The gradient passes unchanged, except that it is zero for values
        that saturate.
    """
    return BlockFloatFunction.apply(x, compute_tensor_scale(x, form), form)


def sorted_index(u: Tensor, form: BlockFormat) -> Tensor:
    """Index of `u` among the sorted values of a format: zero has index 0, the next value index 1.

    Args:
        u: any shape, float32, in units of the scale.
        form: one of `BLOCK_FORMATS`.

    Returns:
        The shape of `u`, float32, with the sign of `u`; a fraction where `u` is between two values.
    """
    power = _power_below(u).clamp(min=2.0**form.min_exponent)
    exponent = (power.view(torch.int32) >> _MANTISSA_BITS) - _BIAS
    significand = u.abs() / power
    index = (significand + (exponent - form.min_exponent)) * 2**form.mantissa
    return torch.copysign(index, u)


def block_float_codes(x: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of `block_float` (sign, exponent and mantissa as bits) and their scales.

    Returns:
        Codes, uint8, in the shape of `x`; a block that becomes NaN (see `round_blocks`) has codes
        of 0 and a scale of NaN.
        Factors, float32, (..., ceil(n / block_size)): scales of blocks, divided by the tensor scale
        of a two-level format.
        The tensor scale; None for a format with one level.
    """
    tensor_scale = compute_tensor_scale(x, form)
    scaled = _scale_blocks(x, form, tensor_scale)
    index = sorted_index(nearest_float(scaled.values, form), form).nan_to_num()
    sign_bit = index.signbit() * 2 ** (form.bits - 1)
    codes = (index.abs() + sign_bit).to(torch.uint8)
    codes = codes.flatten(-2)[..., : x.shape[-1]]
    factors = scaled.factors.flatten(-2)
    return codes, factors, tensor_scale


def float_values(codes: Tensor, form: BlockFormat) -> Tensor:
    """The values that codes stand for, in units of the scale of their block; float32."""
    if form.bits == _E4M3.bits:
        return codes.view(torch.float8_e4m3fn).float()
    values = torch.tensor(_E2M1, dtype=torch.float32, device=codes.device)
    return values[codes.int()]
