"""Affine scales from data: what to remember of the batches, and the scale at the end. Source: FQ-ViT, in the form of Evol-Q's code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qat.functional.affine import affine_from_range, min_max, slices_along
from qat.functional.affine_search import mse_scale, omse_scale, ptf_scale
from qat.utils.validate import check_choice

METHODS = ("minmax", "percentile", "omse", "mse", "ptf")
OBSERVERS = (*METHODS, "ema")
PERCENTILE = 0.99999
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
    """Range seen so far, float32, one entry per slice along the axis; low = inf, high = -inf before the first batch.

    Outermost ends (all methods but `ema` and `percentile`) of several processes are joined by minimum and maximum, which that start leaves
    as they are. A NaN in the data stays.

    Attributes:
        low: (x.shape[axis],), or (1,) for axis None.
        high: (x.shape[axis],), or (1,) for axis None.
    """

    low: Tensor
    high: Tensor


def empty_range(n: int, device: torch.device | None = None) -> RangeState:
    """The state before the first batch, for `n` slices."""
    return RangeState(torch.full((n,), torch.inf, device=device), torch.full((n,), -torch.inf, device=device))


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
    between = torch.stack([ordered[:, k].lerp(ordered[:, k + 1], q * last - k) for q, k in zip(qs, below, strict=True)])
    return torch.where(ordered[:, -1].isnan(), torch.nan, between)


def observe(state: RangeState | None, x: Tensor, axis: int | None, method: str, momentum: float = MOMENTUM) -> RangeState:
    """Take in one batch.

    `ema` averages the ends of the batches' ranges (the first batch counts in full), `percentile` their quantiles 0.99999 and 0.00001
    in the same way; the other methods keep the smallest and largest value of all batches.

    Args:
        state: after the batches before; None or `empty_range` at the first.
        x: any shape and float dtype.
        axis: dimension that keeps scales of its own, None = one for the tensor.
        method: one of `OBSERVERS`.
        momentum: weight of this batch in a moving average.

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
    first = state.low > state.high
    moved = (old + momentum * (new - old) for old, new in zip(state, (low, high), strict=True))
    return RangeState(*(torch.where(first, new, mean) for new, mean in zip((low, high), moved, strict=True)))


def reaching_zero(state: RangeState) -> RangeState:
    """Extend ranges that lie on one side of zero up to it, where their distance from it is more than a sixteenth of their width.

    A zero point is a code: without zero in the range, the far end of it would be cut off by that distance.
    """
    width = _NEGLIGIBLE * (state.high - state.low)
    low = torch.where(state.low > width, torch.zeros_like(state.low), state.low)
    return RangeState(low, torch.where(state.high < -width, torch.zeros_like(state.high), state.high))


def affine_from_state(state: RangeState, x: Tensor, bits: int, *, signed: bool, axis: int | None, method: str) -> tuple[Tensor, Tensor]:
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


def affine_scale(x: Tensor, bits: int, signed: bool, axis: int | None, method: str = "minmax") -> tuple[Tensor, Tensor]:  # noqa: FBT001  (public signature)
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
    return affine_from_state(observe(None, x, axis, method), x, bits, signed=signed, axis=axis, method=method)
