"""Weights that flip between two codes: their frequency, and freezing them. Source: Nagel et al., arXiv 2203.11086 (ICML 2022)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class OscillationState(NamedTuple):
    """What is known of the codes of one tensor after some looks; float32, the shape of the codes.

    Attributes:
        codes: of the last look.
        direction: sign of the last change that was not zero: 1 = downwards, -1 = upwards, 0 = none yet.
        frequency: exponential mean of "the code turned back at this look", in [0, 1].
        flips: how often it turned back.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    flips: Tensor


def oscillation_step(
    state: OscillationState | None, codes: Tensor, momentum: float
) -> OscillationState:
    """Look at the codes once more.

    An oscillation is a change of the code against the direction of its last change.

    Args:
        state: after the last look; None at the first, which only remembers the codes.
        codes: integers in any dtype.
        momentum: weight of the present look in the frequency, in (0, 1).
    """
    x = codes.float()
    if state is None:
        return OscillationState(x, *(torch.zeros_like(x) for _ in range(3)))
    direction = (state.codes - x).sign()
    turned = (direction * state.direction == -1).float()
    return OscillationState(
        codes=x,
        direction=torch.where(direction == 0, state.direction, direction),
        frequency=momentum * turned + (1 - momentum) * state.frequency,
        flips=state.flips + turned,
    )


class FreezingState(NamedTuple):
    """Which codes iterative freezing holds; the shape of the codes.

    Attributes:
        frozen: bool.
        codes: the integers that frozen entries have from the next look on, float32; of no meaning elsewhere.
        mean: exponential mean of the codes, float32.
    """

    frozen: Tensor
    codes: Tensor
    mean: Tensor


def freezing_step(
    state: FreezingState | None, codes: Tensor, frequency: Tensor, threshold: float, momentum: float
) -> FreezingState | None:
    """Freeze what oscillates more often than the threshold, at the rounded mean of its codes.

    The mean is the one from before this look. While the frequency of a frozen entry, which can only fall, is still above the threshold, its
    integer is rounded anew, as in the authors' code.

    Args:
        state: after the last look; None before the first.
        codes: integers of this look, frozen entries replaced (`with_frozen`).
        frequency: of `oscillation_step` at this look.
        threshold: on the frequency; at 0 and below nothing is tracked or frozen.
        momentum: weight of the present codes in the mean.
    """
    if threshold <= 0:
        return state
    x = codes.float()
    if state is None:
        state = FreezingState(torch.zeros_like(x, dtype=torch.bool), torch.zeros_like(x), x)
    often = frequency > threshold
    return FreezingState(
        frozen=state.frozen | often,
        codes=torch.where(often, state.mean.round(), state.codes),
        mean=momentum * x + (1 - momentum) * state.mean,
    )


def with_frozen(state: FreezingState | None, codes: Tensor) -> Tensor:
    """`codes` in float32, frozen entries replaced by their integers."""
    return codes.float() if state is None else torch.where(state.frozen, state.codes, codes.float())


def cosine_between(first: float, last: float, progress: float) -> float:
    """A value that goes from `first` to `last` along half a cosine while `progress` goes from 0 to 1."""
    return last + (first - last) / 2 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
