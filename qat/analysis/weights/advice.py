"""What of the weights and activations of a net gives cause to worry; every limit is here, and in docs/analysis.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from qat.analysis.analysis import Advice
from qat.analysis.weights.activation_stats import ActivationStats, unused_levels
from qat.analysis.weights.weight_stats import Codes, WeightStats
from qat.functional.lsq import SCALE_FLOOR

T = TypeVar("T")

# Up to here a net has so few levels that each of them, and the shape of the tensor, counts.
LOW_BITS = 4
# With fewer values a level, an empty one is chance.
VALUES_PER_LEVEL = 25
# An offset smaller than this share of a step everywhere moves next to no value to another code.
OFFSET_STEPS = 1e-3
# Where post-training calibration of a range of width zero ends up, too.
SMALLEST_STEP = max(SCALE_FLOOR, 1.2e-7)
_NAMED = 3


@dataclass(frozen=True)
class HealthCheck(Generic[T]):
    """One kind of trouble.

    Attributes:
        measure: a number of one tensor; NaN where it does not apply.
        limit: there is trouble above it.
        what: text, `{worst}` = the largest number.
        advice: what to do.
    """

    measure: Callable[[T], float]
    limit: float
    what: str
    advice: str


def advice(label: str, weights: Sequence[WeightStats], activations: Sequence[ActivationStats]) -> list[Advice]:
    """One entry for each kind of trouble; it names the tensors, the worst first.

    Args:
        label: of the net.
        weights: of the net; tensors in float are looked at only if all of them are.
        activations: of the net.
    """
    coded = [stats for stats in weights if stats.codes is not None] or list(weights)
    found = [_told(label, check, [(check.measure(s), s.title) for s in coded]) for check in WEIGHTS]
    found += [_told(label, check, [(check.measure(s), s.site) for s in activations]) for check in ACTIVATIONS]
    return [entry for entry in found if entry is not None]


def _told(label: str, check: HealthCheck, measured: Sequence[tuple[float, str]]) -> Advice | None:
    over = sorted(((value, title) for value, title in measured if value > check.limit), key=lambda pair: -pair[0])
    if not over:
        return None
    names = ", ".join(title for _, title in over[:_NAMED])
    more = f" and {len(over) - _NAMED} more" if len(over) > _NAMED else ""
    return Advice(f"{label}: {names}{more}", check.what.format(worst=over[0][0]), check.advice)


def _of_codes(measure: Callable[[Codes], float], *, low: bool | None = None) -> Callable[[WeightStats], float]:
    """A measure of tensors with codes; `low` = only up to, or only above, `LOW_BITS`."""

    def measured(stats: WeightStats) -> float:
        fits = low is None or (stats.bits <= LOW_BITS) == low
        return measure(stats.codes) if stats.codes is not None and fits else math.nan

    return measured


def _kurtosis(stats: WeightStats) -> float:
    return stats.kurtosis if stats.bits <= LOW_BITS or stats.codes is None else math.nan


def _unused(stats: WeightStats) -> float:
    few = stats.codes is None or stats.bits > LOW_BITS or stats.n_weights < VALUES_PER_LEVEL * len(stats.codes.usage)
    return math.nan if few or stats.codes is None else 100 * stats.codes.unused / len(stats.codes.usage)


def _lost(stats: WeightStats) -> float:
    """Bits that codes do not use, of tensors that have enough weights to use them all."""
    few = stats.codes is None or stats.bits <= LOW_BITS or stats.n_weights < VALUES_PER_LEVEL * len(stats.codes.usage)
    return math.nan if few or stats.codes is None else stats.bits - stats.codes.entropy


def _at_ends(stats: WeightStats) -> float:
    return math.nan if stats.codes is None or stats.bits < LOW_BITS else 100 * stats.codes.at_ends


def _too_small(smallest: float) -> float:
    return float(smallest <= SMALLEST_STEP)


def _ratio(step: tuple[float, float, float]) -> float:
    return step[2] / step[1] if step[1] > 0 else math.nan


def _idle_offset(stats: ActivationStats) -> float:
    return float(any(offset is not None and offset < OFFSET_STEPS for offset in (stats.before, stats.after)))


def _row_shift(stats: ActivationStats) -> float:
    """Behind keys and query-key products an offset shifts whole softmax rows."""
    return float(stats.role == "k" and stats.after is not None)


def _clipped_activations(stats: ActivationStats) -> float:
    # The logarithmic quantizer rounds what is below its smallest power of two to zero: that is no loss to speak of.
    return math.nan if stats.seen is None or stats.quantizer == "log2" else 100 * stats.seen.clipped_share


def _unused_activations(stats: ActivationStats) -> float:
    if stats.seen is None or stats.bits > LOW_BITS or int(stats.seen.counts.sum()) < VALUES_PER_LEVEL * len(stats.seen.counts):
        return math.nan
    return 100 * unused_levels(stats.seen.usage) / len(stats.seen.counts)


WEIGHTS: tuple[HealthCheck[WeightStats], ...] = (
    HealthCheck(
        lambda w: float(w.spread == 0),
        0,
        "constant: all weights of the tensor are equal",
        "They carry nothing; see whether the checkpoint was loaded completely, and whether training reaches them.",
    ),
    HealthCheck(
        lambda w: 100 * w.dead / w.channels if w.spread else 0.0,
        0,
        "dead channels (next to no weight, or one level for all weights), up to {worst:.1f} % of a tensor",
        "Finer scales (one a channel), a smaller step, or more bits; a channel that is dead in float can be removed.",
    ),
    HealthCheck(
        _of_codes(lambda c: _too_small(c.step[0])),
        0,
        "a step of zero, or one that is held at the smallest that is allowed",
        "Initialise the scales anew from data (start from the float checkpoint), with a lower learning rate for scales.",
    ),
    HealthCheck(
        _of_codes(lambda c: _ratio(c.step)),
        20,
        "a channel whose step is up to {worst:.0f} times the median one",
        "Look at these channels in the float net; when they are outliers, equalise them or keep the layer at more bits.",
    ),
    HealthCheck(
        _of_codes(lambda c: 100 * c.clipped),
        25,
        "saturated: up to {worst:.0f} % of the weights are more than half a step beyond the outermost levels",
        "A larger step: initialise it by `mse` or `minmax`; StatsQ does this to long-tailed weights, which loss.kure=1 flattens.",
    ),
    HealthCheck(
        _at_ends,
        30,
        "at 4 bits or more, up to {worst:.0f} % of the weights are at the two end codes",
        "A larger step.",
    ),
    HealthCheck(
        _unused,
        15,
        "at 4 bits or fewer, up to {worst:.0f} % of the levels are empty",
        "A smaller step, one scale a channel, or fewer bits for these layers (quant.overrides).",
    ),
    HealthCheck(
        _lost,
        3.5,
        "the entropy of the codes is up to {worst:.1f} bits below their width",
        "Fewer bits would hold them (quant.overrides, quant.stem_bits, quant.head_bits), or a smaller step would serve them better.",
    ),
    HealthCheck(
        _of_codes(lambda c: -c.snr),
        0,
        "the quantized weights are farther from the float ones than zeros would be",
        "Their scales do not fit; calibrate anew, or train on.",
    ),
    HealthCheck(
        _kurtosis,
        6,
        "a kurtosis of up to {worst:.1f}: tails longer than Laplace's (6) on few levels",
        "Flatten them while training (loss.kure=1), or keep these layers at more bits (quant.overrides).",
    ),
)
ACTIVATIONS: tuple[HealthCheck[ActivationStats], ...] = (
    HealthCheck(
        lambda a: _too_small(a.step[0]),
        0,
        "a step of zero or below, or one held at the smallest that is allowed",
        "Initialise the scales anew from data, with a lower learning rate for scales.",
    ),
    HealthCheck(
        lambda a: _ratio(a.step),
        100,
        "a token or channel whose step is up to {worst:.0f} times the median one",
        "An outlier; a scale a channel or token copes with it, one a tensor would not.",
    ),
    HealthCheck(
        _row_shift,
        0,
        "a learnable offset that cannot matter: behind keys it shifts whole softmax rows",
        "Load the checkpoint with qat, which drops them; an optimizer with weight decay or Adam moves them by rounding noise.",
    ),
    HealthCheck(
        _idle_offset,
        0,
        "a learnable offset that is zero, or below a thousandth of a step, everywhere",
        "Train on, give the offsets a higher rate, or leave them out (quant.offsets=false).",
    ),
    HealthCheck(
        _clipped_activations,
        10,
        "up to {worst:.0f} % of the values that images gave are clipped",
        "Larger steps: calibrate on more images, or train the scales longer.",
    ),
    HealthCheck(
        _unused_activations,
        15,
        "at 4 bits or fewer, up to {worst:.0f} % of the levels are empty",
        "Smaller steps, offsets where the values lie to one side, or an unsigned range.",
    ),
)
