"""Affine scales found by trying candidates on data. Source: FQ-ViT (arXiv 2111.13824), in the form of Evol-Q's code (arXiv 2308.10814)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qat.functional.affine import asymmetric_scale, code_range, fake_quantize_affine_, symmetric_scale
from qat.functional.ste import group_size, sum_along

Rule = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]

# Both ends of a range are multiplied by 1, 0.99, ... 0.11.
SHRINK_FACTORS = tuple(1.0 - i * 0.01 for i in range(90))
# The largest is the scale of the whole tensor.
PTF_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0)


def affine_error(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int], axis: int | None, per: int | None) -> Tensor:
    """Mean squared error of fake quantization along `axis`, float32, per slice along `per`: (x.shape[per],), or (1,) for None."""
    x = x.detach().float()
    error = fake_quantize_affine_(x.clone(), scale, zero_point, *bounds, axis).sub_(x).square_()
    return sum_along(error, per) / group_size(x, per)


def _shrunk(
    x: Tensor, ends: tuple[Tensor, Tensor], bounds: tuple[int, int], rule: Rule, axis: int | None, per: int | None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the shrunk range with the smallest error; of several, the widest. One factor per slice along `per`."""
    factors = torch.tensor(SHRINK_FACTORS, dtype=torch.float32, device=x.device)
    low, high = ends
    errors = [affine_error(x, *rule(low * factor, high * factor, *bounds), bounds, axis, per) for factor in factors]
    # argmin takes the first of equal errors.
    best = factors[torch.stack(errors).argmin(0)]
    return rule(low * best, high * best, *bounds)


def omse_scale(x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None) -> tuple[Tensor, Tensor]:
    """Shrink the ranges of all slices by one common factor; asymmetric for signed codes too.

    Args:
        x: data on which the error is measured, any shape.
        low: (x.shape[axis],) or (1,), lower end of the range to shrink.
        high: (x.shape[axis],) or (1,), its upper end.
        bits: 2 to 8.
        signed: where the codes lie; the formula stays asymmetric.
        axis: dimension that keeps scales of its own, None = one for the tensor.

    Returns:
        scale and zero point, float32, the shape of `low`.
    """
    return _shrunk(x, (low, high), code_range(bits, signed=signed), asymmetric_scale, axis, None)


def mse_scale(x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None) -> tuple[Tensor, Tensor]:
    """Shrink the range of every slice by a factor of its own, symmetric for signed codes: never worse than min-max. See `omse_scale`."""
    rule = symmetric_scale if signed else asymmetric_scale
    return _shrunk(x, (low, high), code_range(bits, signed=signed), rule, axis, axis)


def ptf_scale(x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None) -> tuple[Tensor, Tensor]:
    """Power-of-two factors: the scale of the whole tensor times 1/8, 1/4, 1/2 or 1 per slice, the smallest of equally good ones.

    The zero point is that of the whole tensor, asymmetric for signed codes too. See `omse_scale`.
    """
    bounds = code_range(bits, signed=signed)
    scale, zero_point = (t.expand_as(low) for t in asymmetric_scale(low.amin(0, keepdim=True), high.amax(0, keepdim=True), *bounds))
    errors = [affine_error(x, scale * factor, zero_point, bounds, axis, axis) for factor in PTF_FACTORS]
    factors = torch.tensor(PTF_FACTORS, dtype=torch.float32, device=x.device)
    return scale * factors[torch.stack(errors).argmin(0)], zero_point.clone()
