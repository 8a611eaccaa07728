"""Weights near a decision threshold: the band of confidence-guided annealing (CGA).

Source: OFQ, arXiv 2302.02210.
"""

from __future__ import annotations

from torch import Tensor

from qat.functional.statsq import statsq_coordinate, statsq_scale
from qat.functional.ste import nearest_codes
from qat.utils.validate import check_bits, check_number


def check_boundary(setting: str, boundary: object) -> None:
    """Raise `UsageError` unless `boundary`, half the width of a band, is above 0 and below 0.5."""
    check_number(setting, boundary, 0, exclusive_lowest=True, below=0.5)


def in_band(z: Tensor, qmin: int, qmax: int, boundary: float) -> Tensor:
    """True where z is within `boundary` of a threshold between the lowest and highest code of z.

    A threshold is i + 1/2, where the integer i is at least the lowest code of z and less than the
    highest.

    Args:
        z: coordinates on the axis of codes, float32; a rounded coordinate is the code.
        qmin: lowest code of the grid.
        qmax: highest code of the grid.
        boundary: half-width of the band in codes. It is below 0.5, so that only the threshold
            floor(z) + 1/2 can be near.
    """
    check_boundary("boundary", boundary)
    codes = nearest_codes(z, qmin, qmax)
    floor = z.floor()
    fraction = z - floor
    is_inner = (floor >= codes.amin()) & (floor < codes.amax())
    return is_inner & (fraction >= 0.5 - boundary) & (fraction <= 0.5 + boundary)


def near_threshold(w: Tensor, bits: int, boundary: float) -> Tensor:
    """Mask of the weights that CGA trains: those within `boundary` of a threshold of StatsQ.

    With z = clamp(w/s, -1, 1 - 1e-6) * 2^(bits-1) - 1/2 for the scale s of `w`, an entry is near if
    |z - i - 1/2| <= boundary for an integer i, lowest <= i < highest, where lowest and highest are
    the outermost codes that occur in the tensor. The band includes both ends, as in OFQ's code.

    Args:
        w: (out, in), (d0, d1, d2) or (O, I, kh, kw).
        bits: 2 to 8.
        boundary: half-width of the band in codes, 0 < boundary < 0.5; boundary * s / 2^(bits-1) in
            the unit of a weight.

    Returns:
        bool, the shape of `w`: True = trainable.

    Raises:
        ValueError: `w` has fewer than 2 or more than 4 dimensions.
        UsageError: `bits` or `boundary` is out of range.
    """
    check_bits("bits", bits)
    n = 2 ** (bits - 1)
    z = statsq_coordinate(w.detach(), statsq_scale(w), bits)
    return in_band(z, -n, n - 1, boundary)
