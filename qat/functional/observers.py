"""Affine scales from data: what to remember of the batches, candidates tried on the last one, and the scale at the end.

Source: FQ-ViT (arXiv 2111.13824), in the form of Evol-Q's code (arXiv 2308.10814).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qat.functional.affine import (
    affine_from_range,
    asymmetric_scale,
    code_range,
    fake_quantize_affine_,
    min_max,
    slices_along,
    symmetric_scale,
)
from qat.functional.ste import group_size, sum_along
from qat.utils.validate import check_choice

Rule = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]

# Both ends of a range are multiplied by 1, 0.99, ... 0.11.
SHRINK_FACTORS = tuple(1.0 - i * 0.01 for i in range(90))
# The largest is the scale of the whole tensor.
PTF_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0)


def affine_error(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bounds: tuple[int, int],
    axis: int | None,
    per: int | None,
) -> Tensor:
    """Mean squared error of fake quantization along `axis`, float32, per slice along `per`: (x.shape[per],), or (1,) for None."""
    x = x.detach().float()
    error = fake_quantize_affine_(x.clone(), scale, zero_point, *bounds, axis).sub_(x).square_()
    return sum_along(error, per) / group_size(x, per)


def _shrunk(
    x: Tensor,
    ends: tuple[Tensor, Tensor],
    bounds: tuple[int, int],
    rule: Rule,
    axis: int | None,
    per: int | None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the shrunk range with the smallest error; of several, the widest. One factor per slice along `per`."""
    factors = torch.tensor(SHRINK_FACTORS, dtype=torch.float32, device=x.device)
    low, high = ends
    errors = [
        affine_error(x, *rule(low * factor, high * factor, *bounds), bounds, axis, per)
        for factor in factors
    ]
    # argmin takes the first of equal errors.
    best = factors[torch.stack(errors).argmin(0)]
    return rule(low * best, high * best, *bounds)


def omse_scale(
    x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None
) -> tuple[Tensor, Tensor]:
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


def mse_scale(
    x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Shrink the range of every slice by a factor of its own, symmetric for signed codes: never worse than min-max. See `omse_scale`."""
    rule = symmetric_scale if signed else asymmetric_scale
    return _shrunk(x, (low, high), code_range(bits, signed=signed), rule, axis, axis)


def ptf_scale(
    x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Power-of-two factors: the scale of the whole tensor times 1/8, 1/4, 1/2 or 1 per slice, the smallest of equally good ones.

    The zero point is that of the whole tensor, asymmetric for signed codes too. See `omse_scale`.
    """
    bounds = code_range(bits, signed=signed)
    scale, zero_point = (
        t.expand_as(low)
        for t in asymmetric_scale(low.amin(0, keepdim=True), high.amax(0, keepdim=True), *bounds)
    )
    errors = [
        affine_error(x, scale * factor, zero_point, bounds, axis, axis) for factor in PTF_FACTORS
    ]
    factors = torch.tensor(PTF_FACTORS, dtype=torch.float32, device=x.device)
    return scale * factors[torch.stack(errors).argmin(0)], zero_point.clone()


METHODS = ("minmax", "percentile", "omse", "mse", "ptf")
OBSERVERS = (*METHODS, "ema")
PERCENTILE = 0.99999
# Weight of a batch in a moving average.
MOMENTUM = 0.01
# These remember a moving average of the ends of the range, the others the outermost ends.
_MOVING = ("ema", "percentile")
# These try candidates on a batch; the others need nothing but the range.
SEARCHES = {"omse": omse_scale, "mse": mse_scale, "ptf": ptf_scale}
# torch.quantile computes ranks in float32, which are no whole numbers beyond 2^24; older versions refuse longer rows.
LONGEST_ROW = 16_000_000
# Share of a one-sided range that may fall off the codes.
_NEGLIGIBLE = 1 / 16


class RangeState(NamedTuple):
    """Range seen so far, float32, one entry per slice along the axis. A NaN in the data stays.

    Attributes:
        low: (x.shape[axis],), or (1,) for axis None.
        high: (x.shape[axis],), or (1,) for axis None.
    """

    low: Tensor
    high: Tensor


def quantiles(rows: Tensor, *qs: float) -> Tensor:
    """Quantiles of every row with linear interpolation: `torch.quantile`, of rows of any length.

    Args:
        rows: (n, m) float32.
        qs: each in [0, 1].

    Returns:
        (len(qs), n); NaN where a row holds one.
    """
    last = rows.shape[1] - 1
    if last < LONGEST_ROW:
        return torch.quantile(rows, rows.new_tensor(qs), dim=1)
    # Sorted as torch.quantile does it: kthvalue takes a time quadratic in m for rows that are sorted already.
    ordered = rows.sort(dim=1).values
    below = [min(int(q * last), last - 1) for q in qs]
    between = torch.stack([
        ordered[:, k].lerp(ordered[:, k + 1], q * last - k) for q, k in zip(qs, below, strict=True)
    ])
    return torch.where(ordered[:, -1].isnan(), torch.nan, between)


def observe(state: RangeState | None, x: Tensor, axis: int | None, method: str) -> RangeState:
    """Take in one batch.

    `ema` averages the ends of the batches' ranges (the first batch counts in full), `percentile` their quantiles 0.99999 and 0.00001
    in the same way; the other methods keep the smallest and largest value of all batches.

    Args:
        state: after the batches before; None at the first.
        x: any shape and float dtype.
        axis: dimension that keeps scales of its own, None = one for the tensor.
        method: one of `OBSERVERS`.

    Raises:
        UsageError: unknown method.
    """
    check_choice("method", method, OBSERVERS)
    if method == "percentile":
        low, high = quantiles(slices_along(x, axis), 1.0 - PERCENTILE, PERCENTILE)
    else:
        low, high = min_max(x, axis)
    if state is None:
        return RangeState(low, high)
    if method not in _MOVING:
        return RangeState(torch.minimum(state.low, low), torch.maximum(state.high, high))
    return RangeState(
        *(old + MOMENTUM * (new - old) for old, new in zip(state, (low, high), strict=True))
    )


def reaching_zero(state: RangeState) -> RangeState:
    """Extend ranges that lie on one side of zero up to it, where their distance from it is more than a sixteenth of their width.

    A zero point is a code: without zero in the range, the far end of it would be cut off by that distance.
    """
    width = _NEGLIGIBLE * (state.high - state.low)
    low = torch.where(state.low > width, torch.zeros_like(state.low), state.low)
    return RangeState(
        low, torch.where(state.high < -width, torch.zeros_like(state.high), state.high)
    )


def affine_from_state(
    state: RangeState, x: Tensor, bits: int, *, signed: bool, axis: int | None, method: str
) -> tuple[Tensor, Tensor]:
    """Scale and zero point after the last batch; see `affine_scale`.

    Args:
        state: of `observe`, with the same axis and method.
        x: the last batch, on which `omse`, `mse` and `ptf` measure their errors.
        bits: 2 to 8.
        signed: codes in [-2^(b-1), 2^(b-1)-1] or [0, 2^b-1].
        axis: dimension that keeps scales of its own, None = one for the tensor.
        method: one of `OBSERVERS`.
    """
    check_choice("method", method, OBSERVERS)
    if search := SEARCHES.get(method):
        return search(x, *state, bits, signed=signed, axis=axis)
    return affine_from_range(*state, bits, signed=signed)


def affine_scale(
    x: Tensor,
    bits: int,
    signed: bool,  # noqa: FBT001  (public signature)
    axis: int | None,
    method: str = "minmax",
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for `fake_quantize_affine`, from one tensor.

    Unsigned codes are asymmetric; signed ones are symmetric with zero point 0, but for `omse` and `ptf`.

    Args:
        x: any shape and float dtype.
        bits: 2 to 8.
        signed: codes in [-2^(b-1), 2^(b-1)-1] or [0, 2^b-1].
        axis: dimension that keeps scales of its own, None = one for the tensor.
        method: how the range is found: `minmax`; `percentile`, quantiles 0.99999 and 0.00001; `omse`, both ends of all ranges shrunk by the
            one factor of 1, 0.99, ... 0.11 with the smallest squared error; `mse`, by a factor per slice; `ptf`, one scale times 1/8, 1/4,
            1/2 or 1 per slice.

    Returns:
        scale (at least float32 eps; an eighth of it for `ptf`) and zero point (a whole number stored as float32), (x.shape[axis],) each, or
        (1,) for None.

    Raises:
        UsageError: unknown method.
    """
    check_choice("method", method, METHODS)
    return affine_from_state(
        observe(None, x, axis, method), x, bits, signed=signed, axis=axis, method=method
    )
