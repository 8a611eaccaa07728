"""The range of StatsQ by root mean square and bits. Source: QuEST, arXiv 2502.05003, whose range this is, on StatsQ's levels."""

from __future__ import annotations

import torch
from torch import Tensor

# The outermost level in standard deviations that gives 2^bits evenly spaced levels the least squared error on normal values.
GAUSSIAN_RANGE = {2: 1.4935, 3: 2.0511, 4: 2.5139, 5: 2.9161, 6: 3.2780, 7: 3.6111, 8: 3.9222}


def statsq_rms_scale(w: Tensor, bits: int) -> Tensor:
    """Scale of StatsQ, whose levels reach from -s (n - 1/2) / n to s (n - 1/2) / n, so that the outermost is c_b times a row's RMS.

    Args:
        w: (out, in), (d0, d1, d2) or (O, I, kh, kw).
        bits: 2 to 8.

    Returns:
        The shape of `statsq_scale(w)`, float32, without gradient. Zero for an all-zero row.
    """
    if not 2 <= w.ndim <= 4:
        raise ValueError(f"statsq_rms: w has {w.ndim} dimensions, expected 2, 3 or 4")
    kept = 1 if w.ndim == 3 else 0
    others = tuple(i for i in range(w.ndim) if i != kept)
    rms = torch.linalg.vector_norm(w.detach().float(), dim=others, keepdim=True) / (w.numel() / w.shape[kept]) ** 0.5
    return GAUSSIAN_RANGE[bits] * 2**bits / (2**bits - 1) * rms
