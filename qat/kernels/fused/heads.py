"""Matrix products of attention, usually one head at a time, on views, so that no head is copied.

A batched product needs matrices at equal distances in memory. The images of one head are at equal
distances, but all heads of all images are not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels.library import operator

# On a CPU, products with at least this many elements per image are written in place. Copying them
# instead takes 0.4 times as long for 16 tokens of 32 channels, and 1.15 times as long for 197
# tokens of 64 channels.
MIN_IN_PLACE = 2048

# By device, rows of scores are padded to a multiple of this many elements: tensor cores read 16
# bytes at once, and take several times as long on unpadded rows.
ROW_MULTIPLES = {"cuda": 8}


def pad_tokens(x: Tensor) -> Tensor:
    """Pad `x` (B, N, C) with tokens of zeros to the multiple in `ROW_MULTIPLES` of its device."""
    multiple = ROW_MULTIPLES.get(x.device.type, 1)
    padding = -x.shape[1] % multiple
    if padding == 0:
        return x
    return F.pad(x, (0, 0, 0, padding))


def view_by_head(x: Tensor, num_heads: int) -> Tensor:
    """View (B, N, h*d) as (h, B, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).permute(2, 0, 1, 3)


@operator("(Tensor a, Tensor b, Tensor(a!) out, float factor) -> ()")
def heads_product(a: Tensor, b: Tensor, out: Tensor, factor: float) -> None:
    """Write factor * (a @ b) of each head and image to `out`.

    Args:
        a: (h, B, n, k), or (B, n, k) if all heads have the same matrix.
        b: (h, B, k, m), or (B, k, m) if all heads have the same matrix.
        out: (h, B, n, m), with any strides.
        factor: a power of two is multiplied inside the matrix product, any other factor afterwards,
            so that results are rounded as with two operations.
    """
    alpha = exact_factor(factor)
    for head, head_out in enumerate(out.unbind(0)):
        left = a[head] if a.ndim > 3 else a
        right = b[head] if b.ndim > 3 else b
        num_elements = head_out.shape[-2] * head_out.shape[-1]
        # On a CPU, torch computes a non-contiguous output image by image. For small outputs, these
        # calls cost more than a copy of the result.
        if head_out.is_contiguous() or head_out.is_cuda or num_elements >= MIN_IN_PLACE:
            torch.baddbmm(head_out, left, right, beta=0, alpha=alpha, out=head_out)
        else:
            unused = head_out.new_empty(())
            head_out.copy_(torch.baddbmm(unused, left, right, beta=0, alpha=alpha))
    if factor != alpha:
        out.mul_(factor)


@operator("(Tensor a, Tensor b, Tensor(a!) out) -> ()")
def add_products(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Add the products of all heads to `out`; except in float32, the sum is rounded once.

    Rounding once takes one product over all heads. This product copies `a`, and also `b` unless `b`
    is contiguous as (B, k, h, m).

    Args:
        a: (h, B, n, k).
        b: (h, B, k, m).
        out: (B, n, m).
    """
    if a.dtype != torch.float32:
        out.baddbmm_(a.permute(1, 2, 3, 0).flatten(2), b.permute(1, 2, 0, 3).flatten(1, 2))
        return
    for left, right in zip(a.unbind(0), b.unbind(0), strict=True):
        out.baddbmm_(left, right)


def exact_factor(factor: float) -> float:
    """`factor` if it is a power of two, so that multiplying by it does not round; else 1."""
    mantissa, _ = math.frexp(factor)
    return factor if mantissa == 0.5 else 1.0
