"""Uniform affine quantization with a zero point, and scales read off the data."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.ste import code_dtype, round_ste, view_along
from qat.spec import check_bits

METHODS = ("minmax",)
_EPS = torch.finfo(torch.float32).eps


def code_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest code of a `bits`-wide integer."""
    check_bits("bits", bits)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def min_max(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every slice along `axis`, float32, (x.shape[axis],) each, or (1,) for None."""
    x = x.detach().float()
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    low, high = rows.aminmax(dim=1)
    return low, high


def affine_from_range(low: Tensor, high: Tensor, bits: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range: symmetric for signed codes, asymmetric for unsigned ones.

    Returns:
        scale (at least float32 eps) and zero point (a whole number stored as float32), the shape of `low`.
    """
    qmin, qmax = code_range(bits, signed=signed)
    if signed:
        scale = (torch.maximum(low.abs(), high.abs()) / ((qmax - qmin) / 2)).clamp(min=_EPS)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (qmax - qmin)).clamp(min=_EPS)
    return scale, (qmin - (low / scale).round()).clamp(qmin, qmax)


def affine_scale(x: Tensor, bits: int, signed: bool, axis: int | None, method: str = "minmax") -> tuple[Tensor, Tensor]:  # noqa: FBT001  (public signature)
    """Scale and zero point for `fake_quantize_affine`, from one tensor.

    Args:
        x: any shape and float dtype.
        bits: 2 to 8.
        signed: symmetric codes with zero point 0, or asymmetric unsigned ones.
        axis: dimension that keeps scales of its own, None = one for the tensor.
        method: `minmax`.

    Returns:
        scale and zero point, float32, (x.shape[axis],) each, or (1,) for None.

    Raises:
        UsageError: unknown method.
    """
    if method not in METHODS:
        raise UsageError(f"method={method!r}: allowed are {', '.join(METHODS)}")
    low, high = min_max(x, axis)
    return affine_from_range(low, high, bits, signed=signed)


def affine_codes(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """Integer codes of `fake_quantize_affine`, zero point included, in [qmin, qmax]; the shape of `x`."""
    step, zero = view_along(scale.detach(), x.ndim, axis), view_along(zero_point, x.ndim, axis)
    return (x.detach().float() / step + zero).round().clamp(qmin, qmax).to(code_dtype(qmin, qmax))


def fake_quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    """(clamp(round(x / s + z), qmin, qmax) - z) * s, straight through the rounding; codes outside the range have no gradient.

    Args:
        x: any shape and float dtype; computed in float32.
        scale: (x.shape[axis],), or (1,) for axis None; receives a gradient if it asks for one.
        zero_point: likewise, in codes.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps scales of its own, None = one for the tensor.

    Returns:
        The shape and dtype of `x`.
    """
    step, zero = view_along(scale.float(), x.ndim, axis), view_along(zero_point.float(), x.ndim, axis)
    codes = round_ste(x.float() / step + zero)
    # Not a plain clamp: whether that passes a gradient at its bounds depends on the version of torch.
    codes = torch.where((codes >= qmin) & (codes <= qmax), codes, codes.detach().clamp(qmin, qmax))
    return ((codes - zero) * step).to(x.dtype)
