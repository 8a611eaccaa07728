"""Uniform affine quantization with a zero point. Scales read off data: `qat/functional/observers.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.functional.ste import check_fit, code_dtype, round_ste, view_along
from qat.utils.validate import check_bits

_EPS = torch.finfo(torch.float32).eps


def code_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest code of a `bits`-wide integer."""
    check_bits("bits", bits)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def min_max(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every slice along `axis`, float32, (x.shape[axis],) each, or (1,) for None."""
    low, high = slices_along(x, axis).aminmax(dim=1)
    return low, high


def slices_along(x: Tensor, axis: int | None) -> Tensor:
    """The values that share a scale as rows, float32 without gradient: (x.shape[axis], m), or (1, m) for None."""
    x = x.detach().float()
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).unsqueeze(-1).flatten(1)


def symmetric_scale(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Scale max(|low|, |high|) / ((qmax - qmin) / 2), at least float32 eps, and zero point 0; the shape of `low`."""
    scale = (torch.maximum(low.abs(), high.abs()) / ((qmax - qmin) / 2)).clamp(min=_EPS)
    return scale, torch.zeros_like(scale)


def asymmetric_scale(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Scale (high - low) / (qmax - qmin), at least float32 eps, and zero point qmin - round(low / scale), a code; the shape of `low`."""
    scale = ((high - low) / (qmax - qmin)).clamp(min=_EPS)
    return scale, (qmin - (low / scale).round()).clamp(qmin, qmax)


def affine_from_range(
    low: Tensor, high: Tensor, bits: int, *, signed: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range: symmetric for signed codes, asymmetric for unsigned ones.

    Returns:
        scale (at least float32 eps) and zero point (a whole number stored as float32), the shape of `low`.
    """
    rule = symmetric_scale if signed else asymmetric_scale
    return rule(low, high, *code_range(bits, signed=signed))


def affine_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """Integer codes of `fake_quantize_affine`, zero point included, in [qmin, qmax]; the shape of `x`."""
    step, zero = view_along(scale.detach(), x.ndim, axis), view_along(zero_point, x.ndim, axis)
    return (x.detach().float() / step + zero).round().clamp(qmin, qmax).to(code_dtype(qmin, qmax))


def fake_quantize_affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """(clamp(round(x / s + z), qmin, qmax) - z) * s, straight through the rounding; codes outside the range have no gradient.

    Args:
        x: any shape and float dtype; computed in float32.
        scale: (x.shape[axis],), or (1,) for axis None; receives a gradient if it asks for one.
        zero_point: (x.shape[axis],), or (1,) for axis None; in codes.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps scales of its own, None = one for the tensor.

    Returns:
        The shape and dtype of `x`.
    """
    check_fit(x, scale, axis)
    step, zero = (
        view_along(scale.float(), x.ndim, axis),
        view_along(zero_point.float(), x.ndim, axis),
    )
    if not torch.is_grad_enabled():
        # The same steps in one buffer: several times faster, for the search above all.
        return (
            x
            .float()
            .div(step)
            .add_(zero)
            .round_()
            .clamp_(qmin, qmax)
            .sub_(zero)
            .mul_(step)
            .to(x.dtype)
        )
    u = x.float() / step + zero
    rounded = u.detach().round()
    # Not a plain clamp: whether that passes a gradient at its bounds depends on the version of torch. And not of what goes straight
    # through: where u overflows, that is inf - inf.
    codes = torch.where(
        (rounded >= qmin) & (rounded <= qmax), round_ste(u), rounded.clamp(qmin, qmax)
    )
    return ((codes - zero) * step).to(x.dtype)


@torch.no_grad()
def fake_quantize_affine_(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """`fake_quantize_affine` written over `x`, without autograd: one buffer instead of one per operation, for inference.

    The same operations in the same order, so for finite `x` the values are equal to the last bit (the sign of a zero apart). An infinite
    value takes the outermost code.

    Args:
        x: any shape and float dtype; overwritten.
        scale: (x.shape[axis],), or (1,) for axis None.
        zero_point: (x.shape[axis],), or (1,) for axis None; in codes.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps scales of its own, None = one for the tensor.

    Returns:
        `x`.
    """
    if x.dtype != torch.float32:
        return x.copy_(fake_quantize_affine_(x.float(), scale, zero_point, qmin, qmax, axis))
    step, zero = (
        view_along(scale.float(), x.ndim, axis),
        view_along(zero_point.float(), x.ndim, axis),
    )
    return x.div_(step).add_(zero).round_().clamp_(qmin, qmax).sub_(zero).mul_(step)


def correct_mean_and_std(quantized: Tensor, w: Tensor, axis: int = 0) -> Tensor:
    """(q - mean q) std w / (std q + 1e-8) + mean w in every slice along `axis`, unbiased standard deviations.

    Source: Banner et al., arXiv 1810.05723, as used by Evol-Q (arXiv 2308.10814).

    The result leaves the integer grid: it is an affine map of it per output channel. A slice of one element becomes w.

    Args:
        quantized: the fake-quantized weight, any shape.
        w: the weight it was made from, the same shape.
        axis: output channels.

    Returns:
        The shape and dtype of `quantized`.
    """
    rows_q, rows_w = (t.float().movedim(axis, 0).flatten(1) for t in (quantized, w))
    std_q, std_w = (rows.std(-1, correction=min(1, rows.shape[1] - 1)) for rows in (rows_q, rows_w))
    ratio, mean_q, mean_w = (
        view_along(t, w.ndim, axis)
        for t in (std_w / (std_q + 1e-8), rows_q.mean(-1), rows_w.mean(-1))
    )
    # Adding and subtracting mean q rounds as the reference does: its losses come out to the last bit.
    return ((quantized.float() - mean_q) * ratio + mean_q - mean_q + mean_w).to(quantized.dtype)
