"""Scores of query-key reparameterization for `torch.compile`: all heads, which share their queries, in one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.kernels.fused.operand import product_dtype


class _Scores(torch.autograd.Function):
    """x y^T. Autograd's own gradient of y lies transposed in memory, and the kernel after it walks through it in strides."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return torch.bmm(x, y.transpose(1, 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return torch.bmm(grad, y), torch.bmm(grad.transpose(1, 2), x)


def joint_scores(x: Tensor, keys: Tensor, num_heads: int) -> Tensor:
    """The products of x with the keys of each head: x is not copied for every head, and the sum of its gradients is part of a product.

    Args:
        x: (B, N, C), for all heads.
        keys: (B, N*h, C), index token*h + head.
        num_heads: h.

    Returns:
        (B, h, N, N), a view whose last dimension lies in a row.
    """
    by_head = keys.unflatten(1, (-1, num_heads)).transpose(1, 2).flatten(1, 2)
    dtype = product_dtype(x)
    return _Scores.apply(x.to(dtype), by_head.to(dtype)).unflatten(-1, (num_heads, -1)).transpose(1, 2)
