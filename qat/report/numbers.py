"""Numbers as people read them."""

from __future__ import annotations

import math

PREFIXES = ("", "k", "M", "G", "T", "P")


def number(value: object) -> float | None:
    """What a cell holds, None where that is no number."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(str(value))
    except ValueError:
        return None


def shown(value: object) -> str:
    """Whole numbers with separators, others with five digits that count; what is no number as it is."""
    found = number(value)
    if found is None:
        return "" if value is None else str(value)
    if not math.isfinite(found):
        return str(value)
    if found.is_integer() and abs(found) < 1e15:
        return f"{int(found):,}"
    return f"{found:,.2f}" if 100 <= abs(found) < 1e6 else f"{found:.5g}"


def percent(value: float | None) -> str:
    """Two decimals; a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def scaled(value: float | None, unit: str) -> str:
    """Three digits that count and a prefix of powers of 1000: `190 kB`."""
    if value is None:
        return "–"
    power = 0 if value < 1 else min(int(math.log10(value) // 3), len(PREFIXES) - 1)
    digits = f"{value / 1000**power:.3g}"
    return f"{digits} {PREFIXES[power]}{unit}".rstrip()


def times(ratio: float | None) -> str:
    """A factor."""
    if ratio is None:
        return "–"
    return f"{ratio:.1f}×" if ratio < 100 else f"{ratio:,.0f}×"


def spoken(seconds: float) -> str:
    """A duration."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
