"""StatsQ weight quantizer. Source: OFQ, arXiv 2302.02210. Deviations from its code: docs/deviations.md#statsq.

`statsq_forward` is the formula; its gradient is the identity. `qat.kernels` computes the same in one pass over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qat.functional.ste import TINY, code_dtype, in_dtype
from qat.utils.validate import check_bits

# Just inside the end of the range, so that the outermost code is the highest.
TOP_CLIP = 1 - 1e-6
# The outermost level in standard deviations that gives 2^bits evenly spaced levels the least squared error on normal values.
GAUSSIAN_RANGE = {2: 1.4935, 3: 2.0511, 4: 2.5139, 5: 2.9161, 6: 3.2780, 7: 3.6111, 8: 3.9222}


def statsq_scale(w: Tensor) -> Tensor:
    """Scale of StatsQ: twice the mean magnitude, in float32, without gradient.

    Args:
        w: (out, in), (d0, d1, d2) or (O, I, kh, kw).

    Returns:
        (out, 1) for 2-D, (1, d1, 1) for 3-D, (O, 1, 1, 1) for 4-D, in the unit of `w`. Zero for an all-zero row.
    """
    if not 2 <= w.ndim <= 4:
        raise ValueError(f"statsq: w has {w.ndim} dimensions, expected 2, 3 or 4")
    magnitude = w.detach().float().abs()
    # One mean after the other, as the paper's code: all at once, that of equal weights, whose codes are ties, is off by a rounding error.
    mean = (
        magnitude.mean(-1, keepdim=True).mean(0, keepdim=True)
        if w.ndim == 3
        else magnitude.mean(tuple(range(1, w.ndim)), keepdim=True)
    )
    return 2 * mean


def statsq_rms_scale(w: Tensor, bits: int) -> Tensor:
    """Scale of StatsQ by root mean square and bits: the outermost level is c_b times the RMS of a row. Source: QuEST, arXiv 2502.05003.

    Levels reach from -s (n - 1/2) / n to s (n - 1/2) / n, n = 2^(bits-1).

    Args:
        w: (out, in), (d0, d1, d2) or (O, I, kh, kw).
        bits: 2 to 8.

    Returns:
        The shape of `statsq_scale(w)`, float32, without gradient. Zero for an all-zero row.
    """
    if not 2 <= w.ndim <= 4:
        raise ValueError(f"statsq_rms: w has {w.ndim} dimensions, expected 2, 3 or 4")
    kept = 1 if w.ndim == 3 else 0
    others = tuple(i for i in range(w.ndim) if i != kept)
    rms = (
        torch.linalg.vector_norm(w.detach().float(), dim=others, keepdim=True)
        / (w.numel() / w.shape[kept]) ** 0.5
    )
    return GAUSSIAN_RANGE[bits] * 2**bits / (2**bits - 1) * rms


def statsq_coordinate(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Place of `w` on the axis of codes, in [-n - 1/2, n - 1/2) with n = 2^(bits-1): rounding it gives the code."""
    n = 2 ** (bits - 1)
    u = (w.float() / scale.clamp(min=TINY)).clamp(-1.0, TOP_CLIP)
    return u * n - 0.5


def statsq_forward(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The level of every element: s * (k + 1/2) / 2^(bits-1).

    Args:
        w: any shape.
        scale: s, broadcasts against `w`.
        bits: 2 to 8.
    """
    return (statsq_coordinate(w, scale, bits).round() + 0.5) / 2 ** (bits - 1) * scale


class StatsQFunction(torch.autograd.Function):
    """Forward on the grid, identity backward: nothing is kept for it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, scale: Tensor, bits: int) -> Tensor:
        """`statsq_forward`, in the dtype of `w`."""
        return in_dtype(statsq_forward(w, scale, bits), w.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Straight through."""
        return grad, None, None


def statsq_with_scale(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """StatsQ on a given scale that broadcasts against `w`; see `statsq`."""
    return StatsQFunction.apply(w, scale, bits)


def statsq(w: Tensor, bits: int) -> Tensor:
    """Quantize a weight to the 2^bits levels s * (k + 1/2) / 2^(bits-1), k in [-2^(bits-1), 2^(bits-1)-1].

    Args:
        w: (out, in), (d0, d1, d2) or (O, I, kh, kw); any float dtype, computed in float32.
        bits: 2 to 8.

    Returns:
        The shape and dtype of `w`. An all-zero row gives zeros. The gradient is the identity everywhere, also outside the clip
        range; none flows through the scale.
    """
    check_bits("bits", bits)
    return statsq_with_scale(w, statsq_scale(w), bits)


def statsq_codes_with_scale(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes of `statsq_with_scale`; see `statsq_codes`."""
    n = 2 ** (bits - 1)
    return statsq_coordinate(w.detach(), scale, bits).round().to(code_dtype(-n, n - 1))


def statsq_codes(w: Tensor, bits: int) -> Tensor:
    """Integer codes k of `statsq`, in [-2^(bits-1), 2^(bits-1)-1], int8, the shape of `w`."""
    check_bits("bits", bits)
    return statsq_codes_with_scale(w, statsq_scale(w), bits)
