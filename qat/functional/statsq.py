"""StatsQ weight quantizer.

`statsq_forward` is the reference implementation. The gradient of StatsQ is the identity.
`qat.kernels` has faster implementations; their scale may differ by rounding.

Source: OFQ, arXiv 2302.02210. Deviations from its code: docs/deviations.md#statsq.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qat.functional.ste import TINY, code_dtype, in_dtype
from qat.utils.validate import check_bits

# Upper clip of w / s, just below 1, so that a value at the end of the range gets the highest
# code.
TOP_CLIP = 1 - 1e-6
# For each number of bits, the outermost level, in standard deviations, for which 2^bits evenly
# spaced levels have the least squared error on normal values.
GAUSSIAN_RANGE = {2: 1.4935, 3: 2.0511, 4: 2.5139, 5: 2.9161, 6: 3.2780, 7: 3.6111, 8: 3.9222}


def statsq_scale(w: Tensor) -> Tensor:
    """Scale of StatsQ: twice the mean magnitude, in float32, without gradient.

    Args:
        w: (out, in), (d0, d1, d2) or (O, I, kh, kw).

    Returns:
        (out, 1) for 2-D, (1, d1, 1) for 3-D, (O, 1, 1, 1) for 4-D, in the unit of `w`. The scale of
        an all-zero row is zero.

    Raises:
        ValueError: `w` has fewer than 2 or more than 4 dimensions.
    """
    if not 2 <= w.ndim <= 4:
        raise ValueError(f"statsq: w has {w.ndim} dimensions, expected 2, 3 or 4")
    magnitude = w.detach().float().abs()
    if w.ndim == 3:
        # Average one dimension after the other, as in OFQ's code: weights of equal magnitude are
        # halfway between two codes, and the rounding error of a mean over both dimensions would
        # decide which code they get.
        return 2 * magnitude.mean(-1, keepdim=True).mean(0, keepdim=True)
    return 2 * magnitude.mean(tuple(range(1, w.ndim)), keepdim=True)


def statsq_rms_scale(w: Tensor, bits: int) -> Tensor:
    """Scale s for which StatsQ's outermost level is `GAUSSIAN_RANGE[bits]` times the RMS of a row.

    Levels reach from -s (n - 1/2) / n to s (n - 1/2) / n, n = 2^(bits-1).

    Source: QuEST, arXiv 2502.05003.

    Args:
        w: (out, in), (d0, d1, d2) or (O, I, kh, kw).
        bits: 2 to 8.

    Returns:
        The shape of `statsq_scale(w)`, float32, without gradient. The scale of an all-zero row is
        zero.

    Raises:
        ValueError: `w` has fewer than 2 or more than 4 dimensions.
    """
    if not 2 <= w.ndim <= 4:
        raise ValueError(f"statsq_rms: w has {w.ndim} dimensions, expected 2, 3 or 4")
    axis = 1 if w.ndim == 3 else 0
    summed_dims = tuple(dim for dim in range(w.ndim) if dim != axis)
    norm = torch.linalg.vector_norm(w.detach().float(), dim=summed_dims, keepdim=True)
    rms = norm / (w.numel() / w.shape[axis]) ** 0.5
    num_levels = 2**bits
    return GAUSSIAN_RANGE[bits] * num_levels / (num_levels - 1) * rms


def statsq_coordinate(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Coordinate of `w` on the axis of codes, float32, in [-n - 1/2, n - 1/2), n = 2^(bits-1).

    The code is the rounded coordinate.
    """
    n = 2 ** (bits - 1)
    u = (w.float() / scale.clamp(min=TINY)).clamp(-1.0, TOP_CLIP)
    return u * n - 0.5


def statsq_forward(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The level of every element in float32: s * (k + 1/2) / 2^(bits-1) for code k.

    Args:
        w: any shape.
        scale: scale s, which broadcasts against `w`.
        bits: 2 to 8.
    """
    n = 2 ** (bits - 1)
    codes = statsq_coordinate(w, scale, bits).round()
    return (codes + 0.5) / n * scale


class StatsQFunction(torch.autograd.Function):
    """Levels of StatsQ; the backward pass is the identity and needs no saved tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, scale: Tensor, bits: int) -> Tensor:
        """`statsq_forward`, in the dtype of `w`."""
        return in_dtype(statsq_forward(w, scale, bits), w.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Straight through."""
        return grad, None, None


def statsq_with_scale(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`statsq` without its checks, with a given scale that broadcasts against `w`."""
    return StatsQFunction.apply(w, scale, bits)


def statsq(w: Tensor, bits: int) -> Tensor:
    """Quantize a weight to the 2^bits levels s * (k + 1/2) / n, k in [-n, n - 1], n = 2^(bits-1).

    s is `statsq_scale(w)`.

    Args:
        w: (out, in), (d0, d1, d2) or (O, I, kh, kw); any float dtype, computed in float32.
        bits: 2 to 8.

    Returns:
        The shape and dtype of `w`. An all-zero row becomes zeros. The gradient is the identity
        everywhere, even outside the range of the levels; no gradient flows through the scale.

    Raises:
        ValueError: `w` has fewer than 2 or more than 4 dimensions.
        UsageError: `bits` is out of range.
    """
    check_bits("bits", bits)
    return statsq_with_scale(w, statsq_scale(w), bits)


def statsq_codes_with_scale(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes of `statsq_with_scale`, in the range and dtype of `statsq_codes`."""
    n = 2 ** (bits - 1)
    codes = statsq_coordinate(w.detach(), scale, bits).round()
    return codes.to(code_dtype(-n, n - 1))


def statsq_codes(w: Tensor, bits: int) -> Tensor:
    """Integer codes k of `statsq`, in [-2^(bits-1), 2^(bits-1)-1], int8, the shape of `w`."""
    check_bits("bits", bits)
    return statsq_codes_with_scale(w, statsq_scale(w), bits)
