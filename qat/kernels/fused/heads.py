"""Products of attention, a head after the other: neither are heads moved next to each other before, nor back afterwards.

One product of all heads and images would need a single distance from each to the next; of one head's, that is an image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels.library import operator

# Elements of an image's product from which on it is written in place on a CPU: moving takes 0.4 of the time at 16 tokens of 32 channels,
# and 1.15 of it at 197 of 64.
LARGE = 2048


# Elements that a row of scores is a multiple of, by kind of device: tensor cores want 16 bytes, and take several times as long without.
ROWS = {"cuda": 8}


def pad(x: Tensor) -> Tensor:
    """`x` (B, N, C) with zeros after its N keys, so that rows of scores are as long as the device wants them."""
    more = -x.shape[1] % ROWS.get(x.device.type, 1)
    return F.pad(x, (0, 0, 0, more)) if more else x


def heads_of(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, h*d) as a view (h, B, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).permute(2, 0, 1, 3)


@operator("(Tensor a, Tensor b, Tensor(a!) out, float factor) -> ()")
def heads_product(a: Tensor, b: Tensor, out: Tensor, factor: float) -> None:
    """The products factor * (a @ b) for each head and image, written to `out`.

    Args:
        a: (h, B, n, k), or (B, n, k) for all heads.
        b: (h, B, k, m), or (B, k, m) for all heads.
        out: (h, B, n, m); its heads may lie anywhere.
        factor: a power of two is part of the product, another number is multiplied after it, as a product in two steps would be.
    """
    inside = exact_part(factor)
    for head, one in enumerate(out.unbind(0)):
        left, right = (t[head] if t.ndim > 3 else t for t in (a, b))
        # What does not lie in one piece is multiplied image by image: for small ones the calls cost more than to move the result does.
        if one.is_contiguous() or one.is_cuda or one.shape[-2] * one.shape[-1] >= LARGE:
            torch.baddbmm(one, left, right, beta=0, alpha=inside, out=one)
        else:
            one.copy_(torch.baddbmm(one.new_empty(()), left, right, beta=0, alpha=inside))
    if factor != inside:
        out.mul_(factor)


@operator("(Tensor a, Tensor b, Tensor(a!) out) -> ()")
def add_products(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Add the products a (h, B, n, k) @ b (h, B, k, m) of all heads to `out` (B, n, m), in half precision rounded once, after the sum.

    For that it is one product over all heads there, which costs a copy of `a`, and one of `b` unless its (B, k, h, m) is in one piece.
    """
    if a.dtype != torch.float32:
        out.baddbmm_(a.permute(1, 2, 3, 0).flatten(2), b.permute(1, 2, 0, 3).flatten(1, 2))
        return
    for one, other in zip(a.unbind(0), b.unbind(0), strict=True):
        out.baddbmm_(one, other)


def exact_part(factor: float) -> float:
    """A power of two itself, as a product with it is not rounded; else 1."""
    return factor if math.frexp(factor)[0] == 0.5 else 1.0
