"""DoReFa's weight quantizer, for comparison.

Sources: arXiv 1606.06160, equation 9; the ratio is defined as in KURE's robustness scripts (arXiv
2002.07686).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.utils.validate import check_bits, check_number


def squash(w: Tensor) -> Tensor:
    """Map `w` to tanh w / max |tanh w|, between -1 and 1, in float32. Zeros stay zeros."""
    squashed = w.float().tanh()
    return squashed / squashed.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def dorefa(w: Tensor, bits: int, ratio: float = 1.0) -> Tensor:
    """Quantize to 2 q(tanh w / (2 max |tanh w|) + 1/2) - 1.

    Here q rounds to multiples of 1 / ((2^bits - 1) ratio). A ratio of 2 halves the steps; the ratio
    in `qat.analysis` is the inverse of this one. Codes are not clamped, so they may be outside
    [0, 2^bits - 1].

    Args:
        w: any shape and float dtype; computed in float32.
        bits: 2 to 8.
        ratio: above 0.

    Returns:
        The shape and dtype of `w`, roughly in [-1, 1], without gradient. Zero is one of the values
        if (2^bits - 1) ratio is even.

    Raises:
        UsageError: `bits` or `ratio` is out of range.
    """
    check_bits("bits", bits)
    check_number("ratio", ratio, 0, exclusive_lowest=True)
    scale = (2**bits - 1) * ratio
    fraction = squash(w) / 2 + 0.5
    codes = (fraction * scale).round()
    return (2 * codes / scale - 1).to(w.dtype)
