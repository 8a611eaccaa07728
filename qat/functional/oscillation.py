"""Measure how often the codes of weights oscillate, and freeze weights that oscillate often.

Source: Nagel et al., arXiv 2203.11086 (ICML 2022).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class OscillationState(NamedTuple):
    """Running statistics of the codes of one tensor.

    `oscillation_step` returns float32 tensors in the shape of the codes.

    Attributes:
        codes: the latest codes.
        direction: direction of the last change: 1 = down, -1 = up, 0 = no change yet.
        frequency: exponential mean over the updates, where an update counts 1 if the code turned
            back, else 0; in [0, 1].
        flips: number of updates in which the code turned back.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    flips: Tensor


def oscillation_step(
    state: OscillationState | None, codes: Tensor, momentum: float
) -> OscillationState:
    """Update the statistics with new codes.

    An oscillation is a change of the code against the direction of its last change.

    Args:
        state: the result of the last update; None at the first update, which only stores the codes.
        codes: integers in any dtype.
        momentum: weight of the new codes in the frequency, in (0, 1).
    """
    codes = codes.float()
    if state is None:
        return OscillationState(
            codes=codes,
            direction=torch.zeros_like(codes),
            frequency=torch.zeros_like(codes),
            flips=torch.zeros_like(codes),
        )
    direction = (state.codes - codes).sign()
    is_reversal = (direction * state.direction == -1).float()
    return OscillationState(
        codes=codes,
        direction=torch.where(direction == 0, state.direction, direction),
        frequency=momentum * is_reversal + (1 - momentum) * state.frequency,
        flips=state.flips + is_reversal,
    )


class FreezingState(NamedTuple):
    """State of iterative freezing; all tensors have the shape of the codes.

    Attributes:
        frozen: bool, True for frozen entries.
        codes: the code at which each entry is frozen, in any dtype; `replace_frozen` uses it from
            the next update on. Unused where `frozen` is False.
        mean: exponential mean of the codes, float32.
    """

    frozen: Tensor
    codes: Tensor
    mean: Tensor


def freezing_step(
    state: FreezingState | None, codes: Tensor, frequency: Tensor, threshold: float, momentum: float
) -> FreezingState | None:
    """Freeze entries that oscillate too often, at the rounded mean of their codes.

    The mean includes this update only if `state` is None. While the frequency of a frozen entry is
    above the threshold, the frozen code is computed again from the mean, as in the authors' code;
    otherwise the frozen code stays.

    Args:
        state: the result of the last update; None at the first update.
        codes: codes of this update, in which `replace_frozen` has replaced the frozen entries.
        frequency: frequencies of `oscillation_step` in this update.
        threshold: frequency above which an entry is frozen; at 0 or below, the result is `state`.
        momentum: weight of the new codes in the mean.
    """
    if threshold <= 0:
        return state
    codes = codes.float()
    if state is None:
        state = FreezingState(
            frozen=torch.zeros_like(codes, dtype=torch.bool),
            codes=torch.zeros_like(codes),
            mean=codes,
        )
    is_frequent = frequency > threshold
    return FreezingState(
        frozen=state.frozen | is_frequent,
        codes=torch.where(is_frequent, state.mean.round(), state.codes),
        mean=momentum * codes + (1 - momentum) * state.mean,
    )


def replace_frozen(state: FreezingState | None, codes: Tensor) -> Tensor:
    """Return `codes` in float32, with the frozen codes in place of frozen entries."""
    if state is None:
        return codes.float()
    return torch.where(state.frozen, state.codes, codes.float())


def cosine_between(first: float, last: float, progress: float) -> float:
    """Value at `progress`, clamped to [0, 1], of half a cosine wave from `first` to `last`."""
    progress = min(max(progress, 0.0), 1.0)
    return last + (first - last) / 2 * (1 + math.cos(math.pi * progress))
