"""Numbers of runs as text: means, deviations, intervals."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from evidence.claims.intervals import interval

DEFAULT_FORMAT = ".2f"
NO_VALUE = "–"
# Mark of a difference between runs on two types of CPUs.
MIXED = "\\*"
# The usual number of seeds, and the fewest for which an interval is shown.
SEEDS = 3


def formatted(value: float, spec: str = DEFAULT_FORMAT) -> str:
    """A number; zero after rounding has no minus sign."""
    if spec.startswith("+"):
        return format(value, f"+z{spec[1:]}")
    return format(value, f"z{spec}")


def spread(values: Collection[float], spec: str = DEFAULT_FORMAT) -> str:
    """Mean ± sample deviation, or a dash without values.

    The deviation is left out for a single value, and for counts that are all equal.
    """
    if not values:
        return NO_VALUE
    mean = formatted(statistics.mean(values), spec)
    if len(values) == 1:
        return mean
    deviation = statistics.stdev(values)
    if deviation == 0 and spec.endswith(".0f"):
        return mean
    return f"{mean} ± {formatted(deviation, spec.removeprefix('+'))}"


def with_interval(values: Sequence[float], spec: str = DEFAULT_FORMAT) -> str:
    """Mean and 95 % interval; only the mean below 3 values, a dash without values."""
    if not values:
        return NO_VALUE
    mean = formatted(statistics.mean(values), spec)
    ends = interval(values)
    if ends is None or len(values) < SEEDS:
        return mean
    return f"{mean} [{', '.join(formatted(end, spec) for end in ends)}]"
