"""Which weights sit near a decision threshold: the band of confidence-guided annealing. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

from torch import Tensor

from qat.functional.statsq import statsq_coordinate, statsq_scale
from qat.utils.validate import check_bits, check_number


def check_boundary(setting: str, boundary: object) -> None:
    """Raise `UsageError` unless `boundary` is a band half-width in codes, 0 < boundary < 0.5."""
    check_number(setting, boundary, 0, above=True, below=0.5)


def in_band(z: Tensor, qmin: int, qmax: int, boundary: float) -> Tensor:
    """True where z is within `boundary` of i + 1/2, for a whole i from the lowest code that occurs to below the highest.

    Args:
        z: coordinates whose rounding gives the codes, float32.
        qmin: lowest code.
        qmax: highest code.
        boundary: below 0.5, so that at most one threshold is near: the one above floor(z).
    """
    check_boundary("boundary", boundary)
    below, codes = z.floor(), z.round().clamp(qmin, qmax)
    above = z - below
    inner = (below >= codes.amin()) & (below < codes.amax())
    return inner & (above >= 0.5 - boundary) & (above <= 0.5 + boundary)


def near_threshold(w: Tensor, bits: int, boundary: float) -> Tensor:
    """Weights that CGA trains: those within `boundary` of a threshold of StatsQ; it freezes the others.

    With z = clamp(w/s, -1, 1 - 1e-6) * 2^(bits-1) - 1/2 on the present scale s, an entry is near if |z - i - 1/2| <= boundary for a whole
    i between the lowest and the highest code that occur in the tensor (spec of OFQ's code; both ends of the band belong to it).

    Args:
        w: (out, in), (d0, d1, d2) or (O, I, kh, kw).
        bits: 2 to 8.
        boundary: half-width of the band in codes, 0 < boundary < 0.5; in the unit of a weight it is boundary * s / 2^(bits-1).

    Returns:
        bool, the shape of `w`: True = trainable.
    """
    check_bits("bits", bits)
    n = 2 ** (bits - 1)
    return in_band(statsq_coordinate(w.detach(), statsq_scale(w), bits), -n, n - 1, boundary)
