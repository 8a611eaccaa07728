"""Which weights sit near a decision threshold: the band of confidence-guided annealing. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

from torch import Tensor

from qat.functional.statsq import statsq_scale
from qat.functional.ste import view_along
from qat.kernels import statsq_coordinate
from qat.utils.validate import check_bits, check_number


def check_boundary(setting: str, boundary: object) -> None:
    """Raise `UsageError` unless `boundary` is a band half-width in codes, 0 < boundary < 0.5."""
    check_number(setting, boundary, 0, above=True, below=0.5)


def _in_band(z: Tensor, boundary: float) -> Tensor:
    """True where z is within `boundary` of i + 1/2, for a whole i from the lowest code that occurs to below the highest.

    Args:
        z: coordinates whose rounding gives the codes, float32.
        boundary: below 0.5, so that at most one threshold is near: the one above floor(z).
    """
    below, codes = z.floor(), z.round()
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
    check_boundary("boundary", boundary)
    return _in_band(statsq_coordinate(w.detach(), statsq_scale(w), bits), boundary)


def near_step_threshold(w: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, boundary: float) -> Tensor:
    """The same band for a quantizer that rounds clamp(w/s, qmin, qmax) on a stored step, such as LSQ.

    Args:
        w: any shape.
        scale: (w.shape[axis],), or (1,) for axis None, above 0.
        qmin: lowest code.
        qmax: highest code.
        axis: dimension that keeps scales of its own.
        boundary: half-width of the band in codes, 0 < boundary < 0.5.

    Returns:
        bool, the shape of `w`.
    """
    check_boundary("boundary", boundary)
    return _in_band((w.detach().float() / view_along(scale.detach().float(), w.ndim, axis)).clamp(qmin, qmax), boundary)
