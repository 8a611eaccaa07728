"""Attention with quantized probabilities whose scores are never in memory, on CUDA: which one fits, and its launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange
from qat.kernels import gpu
from qat.kernels.library import operator
from qat.kernels.rows import PLAIN
from qat.kernels.tiles import DTYPES, spaced

# A tile has all keys of an image: so many, and in so many bytes each, fit the shared memory of a small device.
LARGEST = 256
# Images: CUDA launches no more programs along the third side of a grid.
MOST = 2**16 - 1


@torch.compiler.assume_constant_result
def _runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cuda"
        and dtype in DTYPES
        and gpu.available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def fits(qkv: Tensor, num_heads: int, scale: Tensor, codes: CodeRange, dtype: torch.dtype) -> bool:
    """Whether the operators take attention without bias and mask; from shapes and the device alone, so that a compiler can ask.

    Args:
        qkv: (B, N, 3*h*d), queries, keys and values.
        num_heads: h.
        scale: of the probabilities.
        codes: of the probabilities.
        dtype: of the factors of products.
    """
    tokens, size = qkv.shape[1], qkv.shape[-1] // (3 * num_heads)
    is_known = not (codes.qmin or codes.half) and (codes.axis, scale.numel()) in (
        (None, 1),
        (-2, tokens),
    )
    # Rows of others would be loaded element by element, which takes more memory.
    fits_tiles = (
        tokens <= LARGEST
        and size % 8 == qkv.shape[-1] % 16 == 0
        and _side(size) * dtype.itemsize <= LARGEST
    )
    return is_known and fits_tiles and 0 < qkv.shape[0] <= MOST and _runs_on(qkv.device, dtype)


def _side(size: int) -> int:
    """Of a tile for so many elements; products want 16."""
    return max(1 << (size - 1).bit_length(), 16)


def _launch(
    name: str,
    block: int,
    given: tuple[Tensor, ...],
    scale: Tensor,
    others: tuple[Tensor | None, ...],
    settings: Any,
) -> None:
    """Run a kernel on queries, keys and values. Blocks of float32, which fills twice the registers, have half the rows."""
    if type(given[0]) not in PLAIN:  # shapes are all that is asked for
        return
    (images, tokens, length), (_, highest, _, _, heads, factor) = given[0].shape, settings
    itemsize, size = given[0].itemsize, length // heads
    block //= itemsize // 2
    tensors, strides = zip(*(spaced(x, length) for x in given), strict=True)
    gpu._launch(
        name, (-(-tokens // block), heads, images),
        (*tensors, scale.expand(tokens).contiguous(), *others), float(highest), factor / math.log(2), float(factor), tokens, *strides,
        SIZE=size, BLOCK_D=_side(size), BLOCK_N=block, BLOCK_M=block if name == "attention_keys" else _side(tokens),
        num_warps=4 if itemsize == 2 and size <= 64 else 8, num_stages=2,
    )  # fmt: skip


# Blocks are the fastest on an H100 for heads of 64 elements and 197 tokens.
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    """`lsq_forward(softmax(factor * q k^T)) v`, each head for itself.

    Args:
        q: (B, N, h*d), N at most 256.
        k: (B, N, h*d).
        v: (B, N, h*d), as all three float32, bfloat16 or float16.
        scale: (N,) or (1,).
        settings: what `CodeRange` takes, for the probabilities; h; the factor.

    Returns:
        (B, N, h*d), and the base-2 logarithms of the rows' sums, (B, h, N), float32.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sums = q.new_empty(q.shape[0], settings[4], q.shape[1], dtype=torch.float32)
    _launch("attention_queries", 64, (q, k, v), scale, (None, sums, out, None, None), settings)
    return out, sums


def attention_backward(
    grad: Tensor, sums: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, *settings: Any
) -> tuple[Tensor, ...]:
    """Gradients of `attention_forward`.

    Args:
        grad: of its first result, in the dtype of `q`.
        sums: its second result.
        q: as in the forward pass.
        k: as in the forward pass.
        v: as in the forward pass.
        scale: as in the forward pass.
        settings: as in the forward pass.

    Returns:
        Those of `q`, `k` and `v`, and `lsq_backward`'s sum for the scale.
    """
    like = (q, k, v, sums, sums)
    dq, dk, dv, dots, errors = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in like
    )
    grad = grad.contiguous()
    _launch("attention_queries", 32, (q, k, v), scale, (grad, sums, dq, dots, errors), settings)
    _launch("attention_keys", 64, (q, k, v), scale, (grad, sums, dots, dk, dv), settings)
    return dq, dk, dv, errors.view(-1, scale.numel()).sum(0)


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor scale, int qmin, int qmax, int? axis, bool half, int num_heads, float factor"
forward = operator(f"({_ARGUMENTS}) -> (Tensor, Tensor)")(attention_forward)
backward = operator(
    f"(Tensor grad, Tensor sums, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)(attention_backward)
