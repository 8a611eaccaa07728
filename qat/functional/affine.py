"""Uniform affine quantization with a zero point.

Scales are computed from ranges, which `qat.functional.observers` finds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.functional.ste import (
    check_fit,
    code_dtype,
    dequantize_nearest_,
    nearest_codes,
    round_ste,
    view_along,
)
from qat.utils.validate import check_bits

_EPS = torch.finfo(torch.float32).eps


def code_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest code of a `bits`-wide integer.

    Raises:
        UsageError: `bits` is not 2 to 8.
    """
    check_bits("bits", bits)
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def min_max(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every slice along `axis`.

    Returns:
        Two float32 tensors, (x.shape[axis],) each, or (1,) each if `axis` is None.
    """
    low, high = slices_along(x, axis).aminmax(dim=1)
    return low, high


def slices_along(x: Tensor, axis: int | None) -> Tensor:
    """Reshape a tensor so that each row contains the values that share a scale.

    Returns:
        (x.shape[axis], m), or (1, m) if `axis` is None; float32 without gradient.
    """
    x = x.detach().float()
    if axis is None:
        return x.reshape(1, -1)
    # With one more dimension, a vector can be flattened, too.
    return x.movedim(axis, 0).unsqueeze(-1).flatten(1)


def symmetric_scale(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [-m, m], where m = max(|low|, |high|).

    Returns:
        The scale m / ((qmax - qmin) / 2), at least float32 eps, and the zero point 0. Both have the
        shape of `low`.
    """
    largest = torch.maximum(low.abs(), high.abs())
    scale = (largest / ((qmax - qmin) / 2)).clamp(min=_EPS)
    return scale, torch.zeros_like(scale)


def asymmetric_scale(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [low, high].

    Returns:
        The scale (high - low) / (qmax - qmin), at least float32 eps, and the zero point
        qmin - round(low / scale), clamped to [qmin, qmax]. Both have the shape of `low`.
    """
    scale = ((high - low) / (qmax - qmin)).clamp(min=_EPS)
    zero_point = (qmin - (low / scale).round()).clamp(qmin, qmax)
    return scale, zero_point


def affine_from_range(
    low: Tensor, high: Tensor, bits: int, *, signed: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range: symmetric for signed codes, asymmetric for unsigned.

    Returns:
        Scale (at least float32 eps) and zero point (a whole number stored as float32). Both have
        the shape of `low`.
    """
    qmin, qmax = code_range(bits, signed=signed)
    if signed:
        return symmetric_scale(low, high, qmin, qmax)
    return asymmetric_scale(low, high, qmin, qmax)


def affine_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """Integer codes of `fake_quantize_affine`, in [qmin, qmax], with the zero point added.

    Returns:
        Codes in the shape of `x`, in the smallest signed integer dtype for [qmin, qmax].
    """
    step = view_along(scale.detach(), x.ndim, axis)
    zero = view_along(zero_point, x.ndim, axis)
    codes = nearest_codes(x.detach().float() / step + zero, qmin, qmax)
    return codes.to(code_dtype(qmin, qmax))


def fake_quantize_affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """Fake-quantize to (clamp(round(x / s + z), qmin, qmax) - z) * s.

    The gradient of `x` passes straight through the rounding. It is zero for elements whose rounded
    x / s + z is outside of [qmin, qmax].

    Args:
        x: any shape and float dtype; computed in float32.
        scale: (x.shape[axis],), or (1,) for axis None; receives a gradient if it requires one.
        zero_point: (x.shape[axis],), or (1,) for axis None; in codes.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension along which scales differ; None = one scale for the tensor.

    Returns:
        The shape and dtype of `x`.

    Raises:
        UsageError: the scale does not fit the shape of `x`.
    """
    check_fit(x, scale, axis)
    step = view_along(scale.float(), x.ndim, axis)
    zero = view_along(zero_point.float(), x.ndim, axis)
    if not torch.is_grad_enabled():
        return dequantize_nearest_(x.float() / step, step, zero, qmin, qmax).to(x.dtype)
    u = x.float() / step + zero
    # The mask needs the codes before they are clamped, so `nearest_codes` cannot be used.
    unclamped_codes = u.detach().round()
    # Not `clamp`: versions of torch differ in whether its gradient passes at the bounds. Clamping
    # `round_ste(u)` fails as well: where u overflows, `round_ste` computes inf - inf.
    is_inside = (unclamped_codes >= qmin) & (unclamped_codes <= qmax)
    codes = torch.where(is_inside, round_ste(u), unclamped_codes.clamp(qmin, qmax))
    return ((codes - zero) * step).to(x.dtype)


@torch.no_grad()
def fake_quantize_affine_(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    """`fake_quantize_affine` in place, without autograd: one float32 buffer for all operations.

    The operations run in the same order as in `fake_quantize_affine`, so results are bit-identical,
    except for the sign of zeros.

    Args:
        x: any shape and float dtype; overwritten.
        scale: (x.shape[axis],), or (1,) for axis None.
        zero_point: (x.shape[axis],), or (1,) for axis None; in codes.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension along which scales differ; None = one scale for the tensor.

    Returns:
        `x`.
    """
    if x.dtype != torch.float32:
        return x.copy_(fake_quantize_affine_(x.float(), scale, zero_point, qmin, qmax, axis))
    step = view_along(scale.float(), x.ndim, axis)
    zero = view_along(zero_point.float(), x.ndim, axis)
    return dequantize_nearest_(x.div_(step), step, zero, qmin, qmax)


def correct_mean_and_std(quantized: Tensor, w: Tensor, axis: int = 0) -> Tensor:
    """Give each slice of `quantized` along `axis` the mean and standard deviation of w's slice.

    The result is (q - mean q) std w / (std q + 1e-8) + mean w, with unbiased standard deviations.
    Its values are therefore not on the grid of q: each slice is on a scaled and shifted copy of
    this grid. A slice of one element becomes w.

    Source: Banner et al., arXiv 1810.05723, as used by Evol-Q (arXiv 2308.10814).

    Args:
        quantized: the fake-quantized weight, with at least 2 dimensions.
        w: the float weight, the same shape.
        axis: dimension of the output channels.

    Returns:
        The shape and dtype of `quantized`.
    """
    rows_q = quantized.float().movedim(axis, 0).flatten(1)
    rows_w = w.float().movedim(axis, 0).flatten(1)
    correction = min(1, rows_q.shape[1] - 1)
    std_q = rows_q.std(-1, correction=correction)
    std_w = rows_w.std(-1, correction=correction)
    ratio = view_along(std_w / (std_q + 1e-8), w.ndim, axis)
    mean_q = view_along(rows_q.mean(-1), w.ndim, axis)
    mean_w = view_along(rows_w.mean(-1), w.ndim, axis)
    # Adding and subtracting mean q rounds as the reference code does, so losses are bit-identical
    # to those of the reference code.
    corrected = (quantized.float() - mean_q) * ratio + mean_q - mean_q + mean_w
    return corrected.to(quantized.dtype)
