"""Numbers as people read them; "–" stands for one that is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qat.utils.text import MISSING


def number(value: object) -> float | None:
    """The number that a value is or spells, else None; NaN and infinity are numbers too."""
    try:
        return None if isinstance(value, bool) else float(str(value))
    except ValueError:
        return None


def shown(value: object) -> str:
    """Whole numbers with separators, others with four significant digits; text as it is."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.2f}" if 100 <= abs(value) < 1e6 else f"{value:.4g}"


def bits_of(recipe: Mapping[str, Any] | None) -> str | None:
    """`W2 A2`; None for a float model."""
    return f"W{recipe['bits']} A{recipe['act_bits']}" if recipe and recipe["name"] != "fp" else None
