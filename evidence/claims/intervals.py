"""How well a mean over seeds is known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats

LEVEL = 0.95
# Shares of images are decimals, which floats only come near to: a margin that is met exactly must come out as equal.
_DIGITS = 12


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean, 95 %, by Student's t (of paired values a paired t-test at 5 %); None of fewer than two."""
    if len(values) < 2:
        return None
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = error * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return round(mean - reach, _DIGITS), round(mean + reach, _DIGITS)
