"""Query-key reparameterization: query and key weights folded into one matrix per head.

Source: OFQ, arXiv 2302.02210.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.ste import without_autocast


def fold_qk(wq: Tensor, wk: Tensor, num_heads: int) -> Tensor:
    """Fold the query and key weights of every head into M_h = Wq_h^T Wk_h, and stack the results.

    Args:
        wq: (h*d, C), rows grouped by head.
        wk: (h*d, C), rows grouped by head.
        num_heads: h.

    Returns:
        (h*C, C), float32 also under autocast; row head*C + i is row i of the product for this head.

    Raises:
        UsageError: the shapes differ, or `num_heads` does not divide the number of rows.
    """
    if wq.shape != wk.shape or wq.shape[0] % num_heads:
        raise UsageError(
            f"num_heads={num_heads}: wq is {tuple(wq.shape)} and wk {tuple(wk.shape)}; must be the "
            "same shape, with a number of rows that num_heads divides"
        )
    with without_autocast(wq):
        q = wq.float().unflatten(0, (num_heads, -1))
        k = wk.float().unflatten(0, (num_heads, -1))
        return torch.bmm(q.transpose(1, 2), k).flatten(0, 1)


def fold_q_bias(wk: Tensor, q_bias: Tensor, num_heads: int) -> Tensor:
    """Fold the query bias into c_h = Wk_h^T b_q,h, which adds c_h . x to scores of token x's key.

    Args:
        wk: (h*d, C), rows grouped by head.
        q_bias: (h*d,).
        num_heads: h.

    Returns:
        (h, C), float32.
    """
    with without_autocast(wk):
        k = wk.float().unflatten(0, (num_heads, -1))
        bias = q_bias.float().unflatten(0, (num_heads, -1))
        return torch.bmm(bias.unsqueeze(1), k).squeeze(1)
