"""Confidence interval of a mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats

LEVEL = 0.95
# Accuracies are decimals, which floats only approximate; rounded to this many digits, an end at
# the margin compares as equal to it.
_DIGITS = 12


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t, or None for fewer than two values.

    For differences of pairs, this is a paired t-test at 5 %.
    """
    if len(values) < 2:
        return None
    mean = statistics.mean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = error * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return round(mean - reach, _DIGITS), round(mean + reach, _DIGITS)
