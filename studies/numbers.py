"""Means with their deviation over seeds, as the page shows them."""

from __future__ import annotations

import statistics
from collections.abc import Collection

DEFAULT = ".2f"
NONE = "–"


def deviation(values: Collection[float]) -> float | None:
    """Sample standard deviation, None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def shown(value: float, spec: str = DEFAULT) -> str:
    """One number; what rounds to zero has no sign but a demanded one."""
    sign, rest = ("+", spec[1:]) if spec.startswith("+") else ("", spec)
    return format(value, f"{sign}z{rest}")


def spread(values: Collection[float], spec: str = DEFAULT) -> str:
    """Mean ± sample deviation; the number alone where there is one, or one count for all; a dash where there is none."""
    if not values:
        return NONE
    mean, around = shown(statistics.mean(values), spec), deviation(values)
    return mean if around is None or (around == 0 and spec.endswith(".0f")) else f"{mean} ± {shown(around, spec.removeprefix('+'))}"
