"""Affine scales from data.

Every batch updates a range: the ends are extended or averaged. Some methods then try candidates
for the scale on the last batch.

Source: FQ-ViT (arXiv 2111.13824), as implemented in Evol-Q's code (arXiv 2308.10814).
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

ScaleRule = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


class Ends(NamedTuple):
    """Ends of ranges, one for each slice: (n,) or (1,), float32."""

    low: Tensor
    high: Tensor


# Factors on the ends of a range: 1, 0.99, ... 0.11.
SHRINK_FACTORS = tuple(1.0 - i * 0.01 for i in range(90))
# Factors on the scale of the whole tensor.
PTF_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0)


def affine_error(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bounds: tuple[int, int],
    axis: int | None,
    error_axis: int | None,
) -> Tensor:
    """Mean squared error of fake quantization.

    Args:
        x: data, any shape and float dtype.
        scale: (x.shape[axis],), or (1,) for axis None.
        zero_point: (x.shape[axis],), or (1,) for axis None; in codes.
        bounds: lowest and highest code.
        axis: dimension along which scales differ; None = one scale for the tensor.
        error_axis: dimension along which each slice has an error of its own; None = one error for
            the tensor.

    Returns:
        (x.shape[error_axis],), or (1,) if `error_axis` is None; float32.
    """
    x = x.detach().float()
    quantized = fake_quantize_affine_(x.clone(), scale, zero_point, *bounds, axis)
    return sum_along(quantized.sub_(x).square_(), error_axis) / group_size(x, error_axis)


def _best_ends(
    x: Tensor,
    candidates: list[Ends],
    bounds: tuple[int, int],
    rule: ScaleRule,
    axis: int | None,
    error_axis: int | None,
) -> Ends:
    """Ends of the range with the smallest error, for each slice along `error_axis`.

    If `error_axis` is None, all slices use the same candidate. Among equally good candidates, the
    first is used.
    """
    errors = []
    for low, high in candidates:
        scale, zero_point = rule(low, high, *bounds)
        errors.append(affine_error(x, scale, zero_point, bounds, axis, error_axis))
    best = torch.stack(errors).argmin(0).expand_as(candidates[0].low).unsqueeze(0)
    lows = torch.stack([ends.low for ends in candidates])
    highs = torch.stack([ends.high for ends in candidates])
    return Ends(lows.gather(0, best).squeeze(0), highs.gather(0, best).squeeze(0))


def _shrunk(low: Tensor, high: Tensor) -> list[Ends]:
    """Ranges whose ends are multiplied by a common factor; the widest comes first."""
    factors = torch.tensor(SHRINK_FACTORS, dtype=torch.float32, device=low.device)
    return [Ends(low * factor, high * factor) for factor in factors]


def omse_scale(
    x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Shrink the ranges of all slices by the common factor with the least squared error.

    The range is asymmetric for signed codes too.

    Args:
        x: data on which the error is measured, any shape.
        low: (x.shape[axis],) or (1,), lower end of the range to shrink.
        high: (x.shape[axis],) or (1,), upper end of the range to shrink.
        bits: 2 to 8.
        signed: True = codes in [-2^(b-1), 2^(b-1)-1]; False = codes in [0, 2^b-1].
        axis: dimension along which scales differ; None = one scale for the tensor.

    Returns:
        Scale and zero point, float32, the shape of `low`.
    """
    bounds = code_range(bits, signed=signed)
    best = _best_ends(x, _shrunk(low, high), bounds, asymmetric_scale, axis, None)
    return asymmetric_scale(*best, *bounds)


def mse_scale(
    x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Shrink the range of each slice by the factor with the least squared error of this slice.

    One of the factors is 1, so the error does not grow. The range is symmetric for signed codes.
    See `omse_scale` for arguments and results.
    """
    bounds = code_range(bits, signed=signed)
    rule = symmetric_scale if signed else asymmetric_scale
    best = _best_ends(x, _shrunk(low, high), bounds, rule, axis, axis)
    return rule(*best, *bounds)


def mse_ends_scale(
    x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Shrink the range of each slice as `mse_scale` does, then choose a factor for each end.

    Outputs of GELU need this: a factor that suits their high end leaves no code for their low end,
    -0.17. For signed codes, the range is symmetric, and the result is that of `mse_scale`. See
    `omse_scale` for arguments and results.
    """
    if signed:
        return mse_scale(x, low, high, bits, signed=signed, axis=axis)
    bounds = code_range(bits, signed=signed)
    shrunk = _shrunk(low, high)
    best = _best_ends(x, shrunk, bounds, asymmetric_scale, axis, axis)
    other_lows = [Ends(ends.low, best.high) for ends in shrunk]
    best = _best_ends(x, [best, *other_lows], bounds, asymmetric_scale, axis, axis)
    other_highs = [Ends(best.low, ends.high) for ends in shrunk]
    best = _best_ends(x, [best, *other_highs], bounds, asymmetric_scale, axis, axis)
    return asymmetric_scale(*best, *bounds)


def ptf_scale(
    x: Tensor, low: Tensor, high: Tensor, bits: int, *, signed: bool, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Power-of-two factors: the scale of the whole tensor times 1/8, 1/4, 1/2 or 1 per slice.

    If several factors are equally good, the smallest is used. There is one zero point for the whole
    tensor, and the range is asymmetric for signed codes too. For arguments and results, see
    `omse_scale`.
    """
    bounds = code_range(bits, signed=signed)
    lowest = low.amin(0, keepdim=True)
    highest = high.amax(0, keepdim=True)
    scale, zero_point = asymmetric_scale(lowest, highest, *bounds)
    scale = scale.expand_as(low)
    zero_point = zero_point.expand_as(low)
    errors = []
    for factor in PTF_FACTORS:
        errors.append(affine_error(x, scale * factor, zero_point, bounds, axis, axis))
    factors = torch.tensor(PTF_FACTORS, dtype=torch.float32, device=x.device)
    return scale * factors[torch.stack(errors).argmin(0)], zero_point.clone()


METHODS = ("minmax", "percentile", "omse", "mse", "mse_ends", "ptf")
OBSERVERS = (*METHODS, "ema")
PERCENTILE = 0.99999
# Weight of a batch in a moving average.
MOMENTUM = 0.01
# Methods that average the ends of the batches' ranges; other methods use the outermost ends.
_AVERAGING_METHODS = ("ema", "percentile")
# Methods that try candidates on a batch; the other methods need only the range.
SEARCHES = {
    "omse": omse_scale,
    "mse": mse_scale,
    "mse_ends": mse_ends_scale,
    "ptf": ptf_scale,
}
# Maximum length of a row for torch.quantile: it computes ranks in float32, which holds integers
# exactly only up to 2^24. Older versions refuse longer rows.
MAX_QUANTILE_VALUES = 16_000_000
# Fraction of a one-sided range that the codes may fail to cover.
_NEGLIGIBLE_GAP = 1 / 16


class RangeState(NamedTuple):
    """Range of each slice along the axis in the batches so far; NaN if the slice contained a NaN.

    Attributes:
        low: lower ends, (x.shape[axis],), or (1,) for axis None; float32.
        high: upper ends, (x.shape[axis],), or (1,) for axis None; float32.
    """

    low: Tensor
    high: Tensor


def quantiles(rows: Tensor, *qs: float) -> Tensor:
    """Quantiles of every row, with linear interpolation like `torch.quantile`, but for any length.

    Args:
        rows: (n, m) float32.
        qs: each in [0, 1].

    Returns:
        (len(qs), n); NaN for a row with a NaN.
    """
    last_rank = rows.shape[1] - 1
    if last_rank < MAX_QUANTILE_VALUES:
        return torch.quantile(rows, rows.new_tensor(qs), dim=1)
    # Sort, as torch.quantile does: one sort serves all quantiles and the check for NaN.
    sorted_rows = rows.sort(dim=1).values
    results = []
    for q in qs:
        rank = min(int(q * last_rank), last_rank - 1)
        results.append(sorted_rows[:, rank].lerp(sorted_rows[:, rank + 1], q * last_rank - rank))
    return torch.where(sorted_rows[:, -1].isnan(), torch.nan, torch.stack(results))


def observe(state: RangeState | None, x: Tensor, axis: int | None, method: str) -> RangeState:
    """Update a range with one batch.

    `ema` averages the ends of the batches' ranges, and `percentile` the quantiles 0.99999 and
    0.00001 of the batches. These averages start at the first batch, and each later batch has the
    weight 0.01. The other methods use the smallest and the largest value of all batches.

    Args:
        state: range of the batches before this one; None at the first batch.
        x: any shape and float dtype.
        axis: dimension along which scales differ; None = one scale for the tensor.
        method: one of `OBSERVERS`.

    Raises:
        UsageError: `method` is unknown.
    """
    check_choice("method", method, OBSERVERS)
    if method == "percentile":
        low, high = quantiles(slices_along(x, axis), 1.0 - PERCENTILE, PERCENTILE)
    else:
        low, high = min_max(x, axis)
    if state is None:
        return RangeState(low, high)
    if method not in _AVERAGING_METHODS:
        return RangeState(torch.minimum(state.low, low), torch.maximum(state.high, high))
    return RangeState(
        low=state.low + MOMENTUM * (low - state.low),
        high=state.high + MOMENTUM * (high - state.high),
    )


def extend_to_zero(state: RangeState) -> RangeState:
    """Extend a one-sided range to zero if its distance from zero is over 1/16 of its width.

    The zero point must be one of the codes. For a range without zero, the codes would therefore
    miss the far end of the range, by as much as the near end is away from zero.
    """
    negligible = _NEGLIGIBLE_GAP * (state.high - state.low)
    zero = torch.zeros_like(state.low)
    return RangeState(
        low=torch.where(state.low > negligible, zero, state.low),
        high=torch.where(state.high < -negligible, zero, state.high),
    )


def affine_from_state(
    state: RangeState, x: Tensor, bits: int, *, signed: bool, axis: int | None, method: str
) -> tuple[Tensor, Tensor]:
    """Scale and zero point after the last batch; see `affine_scale`.

    Args:
        state: result of `observe` with `axis` and `method`, or of `extend_to_zero`.
        x: the last batch, on which the methods of `SEARCHES` measure their errors.
        bits: 2 to 8.
        signed: True = codes in [-2^(b-1), 2^(b-1)-1]; False = codes in [0, 2^b-1].
        axis: dimension along which scales differ; None = one scale for the tensor.
        method: one of `OBSERVERS`.
    """
    check_choice("method", method, OBSERVERS)
    if method in SEARCHES:
        return SEARCHES[method](x, state.low, state.high, bits, signed=signed, axis=axis)
    return affine_from_range(*state, bits, signed=signed)


def affine_scale(
    x: Tensor,
    bits: int,
    signed: bool,  # noqa: FBT001  (public signature)
    axis: int | None,
    method: str = "minmax",
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for `fake_quantize_affine`, from one tensor.

    Unsigned codes are asymmetric. Signed codes are symmetric with zero point 0, except with `omse`
    and `ptf`. Asymmetric codes cover a whole range only if it includes zero (see `extend_to_zero`).

    Args:
        x: any shape and float dtype.
        bits: 2 to 8.
        signed: True = codes in [-2^(b-1), 2^(b-1)-1]; False = codes in [0, 2^b-1].
        axis: dimension along which scales differ; None = one scale for the tensor.
        method: `minmax`: smallest and largest value. `percentile`: quantiles 0.99999 and 0.00001.
            `omse`: both ends of all ranges are multiplied by whichever of the factors 1, 0.99, ...
            0.11 has the smallest squared error. `mse`: one such factor per slice. `mse_ends`: as
            `mse`, then for unsigned codes one factor per end. `ptf`: one scale times 1/8, 1/4, 1/2
            or 1 per slice.

    Returns:
        Scale (at least float32 eps; for `ptf`, at least eps / 8) and zero point (a whole number
        stored as float32), (x.shape[axis],) each, or (1,) each if `axis` is None.

    Raises:
        UsageError: `bits` or `method` is not allowed.
    """
    check_choice("method", method, METHODS)
    state = observe(None, x, axis, method)
    return affine_from_state(state, x, bits, signed=signed, axis=axis, method=method)
