"""Mean and spread of a quantized weight. Source: Banner et al., arXiv 1810.05723, as used by Evol-Q (arXiv 2308.10814)."""

from __future__ import annotations

from torch import Tensor

from qat.functional.ste import view_along

_EPS = 1e-8


def correct_mean_and_std(quantized: Tensor, w: Tensor, axis: int = 0) -> Tensor:
    """(q - mean q) std w / (std q + 1e-8) + mean w in every slice along `axis`, unbiased standard deviations.

    The result leaves the integer grid: it is an affine map of it per output channel. A slice of one element becomes w.

    Args:
        quantized: the fake-quantized weight, any shape.
        w: the weight it was made from, the same shape.
        axis: output channels.

    Returns:
        The shape and dtype of `quantized`.
    """
    rows_q, rows_w = (t.float().movedim(axis, 0).flatten(1) for t in (quantized, w))
    std_q, std_w = (rows.std(-1, correction=min(1, rows.shape[1] - 1)) for rows in (rows_q, rows_w))
    ratio, mean_q, mean_w = (view_along(t, w.ndim, axis) for t in (std_w / (std_q + _EPS), rows_q.mean(-1), rows_w.mean(-1)))
    # Adding and subtracting mean q rounds as the reference does: its losses come out to the last bit.
    return ((quantized.float() - mean_q) * ratio + mean_q - mean_q + mean_w).to(quantized.dtype)
