"""Mean squared error of a uniform grid on uniform and normal weights, in closed form. Source: KURE, arXiv 2002.07686, section 3.

The grid has its levels at the multiples of `step` from -t to t with t = 2^(bits-1) step, 2^bits + 1 of them; what lies outside goes to its
end. Inside, the error is counted as step^2 / 12, as if it were spread evenly over a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Mse = Callable[[float, int], float]

_DENSITY = math.sqrt(2 / math.pi)


def clip_of(step: float, bits: int) -> float:
    """t, the outermost level."""
    return 2 ** (bits - 1) * step


def uniform_mse(step: float, bits: int, half_width: float = 1.0) -> float:
    """Error of a variable that is uniform in [-half_width, half_width], in its unit squared."""
    clip = clip_of(step, bits)
    if clip >= half_width:
        return step**2 / 12
    return (half_width - clip) ** 3 / (3 * half_width) + 2**bits * step**3 / (24 * half_width)


def uniform_best_step(bits: int, half_width: float = 1.0) -> float:
    """Step of the smallest `uniform_mse`, 2 a / (2^bits + 1): the outermost cells then end at the edge."""
    return 2 * half_width / (2**bits + 1)


def uniform_curvature(step: float, bits: int, half_width: float = 1.0) -> float:
    """Second derivative of `uniform_mse` by the step, where the outermost level is inside; 2^(bits-1) at the best step.

    1/2 at 2 a / 2^bits, and 0 at 2 a / (2^bits - 2^-bits), behind which the error is concave.
    """
    clip = clip_of(step, bits)
    return (2 ** (bits - 2) * step + 2 ** (2 * bits - 1) * (half_width - clip)) / half_width


def normal_mse(step: float, bits: int, std: float = 1.0) -> float:
    """Error of a normal variable, in its unit squared; (t^2+1) erfc(t/sqrt2) + t^2 / (3 4^bits) - sqrt(2/pi) t exp(-t^2/2) for std 1."""
    t = clip_of(step, bits) / std
    beyond = (t**2 + 1) * math.erfc(t / math.sqrt(2)) - _DENSITY * t * math.exp(-(t**2) / 2)
    return std**2 * (beyond + t**2 / (3 * 4**bits))


def normal_best_step(bits: int, std: float = 1.0) -> float:
    """Step of the smallest `normal_mse`, by bisection: the error is convex in the step."""
    low, high = 0.0, 10.0
    while (t := (low + high) / 2) not in (low, high):
        slope = t * math.erfc(t / math.sqrt(2)) - _DENSITY * math.exp(-(t**2) / 2) + t / (3 * 4**bits)
        low, high = (t, high) if slope < 0 else (low, t)
    return std * t / 2 ** (bits - 1)


def normal_curvature(step: float, bits: int, std: float = 1.0) -> float:
    """Second derivative of `normal_mse` by the step: 2 4^(bits-1) (erfc(t/sqrt2) + 1 / (3 4^bits)) whatever the std."""
    t = clip_of(step, bits) / std
    return 2 * 4 ** (bits - 1) * (math.erfc(t / math.sqrt(2)) + 1 / (3 * 4**bits))


def snr_db(variance: float, mse: float) -> float:
    """Signal-to-noise ratio in dB."""
    return 10 * math.log10(variance / mse)


def relative_error(mse: Mse, best_step: float, ratio: float, bits: int) -> float:
    """How much the error grows when every step is `ratio` times the best one: MSE(ratio * step) / MSE(step)."""
    return mse(ratio * best_step, bits) / mse(best_step, bits)
