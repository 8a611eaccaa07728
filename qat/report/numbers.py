"""Numbers as people read them; "–" stands for one that is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qat.utils.text import MISSING


def number(value: object) -> float | None:
    """The finite or non-finite number that a value is or spells, else None."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(str(value))
    except ValueError:
        return None


def shown(value: object) -> str:
    """Whole numbers with separators, others with five significant digits; text as it is."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.2f}" if 100 <= abs(value) < 1e6 else f"{value:.5g}"


def percent(value: float | None) -> str:
    """Two decimals."""
    return MISSING if value is None else f"{value:.2f}"


def signed(value: float) -> str:
    """Two decimals and a sign."""
    return f"{value:+.2f}".replace("-", "−")


def times(ratio: float) -> str:
    """A factor."""
    return f"{ratio:.1f}×" if ratio < 100 else f"{ratio:,.0f}×"


def bits_of(recipe: object) -> str | None:
    """`W2 A2`; None of a float model, and of what is no recipe."""
    if not isinstance(recipe, Mapping) or not recipe or recipe.get("name") == "fp":
        return None
    return f"W{recipe.get('bits')} A{recipe.get('act_bits')}"
