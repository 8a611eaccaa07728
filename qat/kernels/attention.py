"""Attention with quantized probabilities on CUDA; its kernels never write scores to memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.functional.lsq import CodeRange
from qat.kernels import gpu
from qat.kernels.library import operator
from qat.kernels.rows import PLAIN_CLASSES
from qat.kernels.tiles import DTYPES, with_row_stride

# Maximum number of tokens, and of bytes in the row of a head: a tile contains all keys of an image,
# and must fit in the shared memory of a small device.
MAX_TOKENS = 256
MAX_ROW_BYTES = 256
# Maximum number of images: CUDA's limit for the third dimension of a grid.
MAX_IMAGES = 2**16 - 1


@torch.compiler.assume_constant_result
def _runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """True if the kernels run on this device, with matrix products in this dtype."""
    if device.type != "cuda" or dtype not in DTYPES or not gpu.available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fits(qkv: Tensor, num_heads: int, scale: Tensor, codes: CodeRange, dtype: torch.dtype) -> bool:
    """True if the operators can compute this attention, which has no bias and no mask.

    The result does not depend on values in tensors, so `torch.compile` can evaluate it.

    Args:
        qkv: (B, N, 3*h*d), queries, keys and values.
        num_heads: h.
        scale: scale of the probabilities.
        codes: codes of the probabilities.
        dtype: dtype of the factors of matrix products.
    """
    num_images, num_tokens, width = qkv.shape
    if codes.qmin or codes.half:
        return False
    if (codes.axis, scale.numel()) not in ((None, 1), (-2, num_tokens)):
        return False
    head_dim = width // (3 * num_heads)
    # Rows of other sizes would be loaded element by element, and this takes more memory.
    if head_dim % 8 or width % 16:
        return False
    if num_tokens > MAX_TOKENS or _tile_side(head_dim) * dtype.itemsize > MAX_ROW_BYTES:
        return False
    return 0 < num_images <= MAX_IMAGES and _runs_on(qkv.device, dtype)


def _tile_side(size: int) -> int:
    """Side of a tile for `size` elements: a power of two, at least 16 for matrix products."""
    return max(1 << (size - 1).bit_length(), 16)


class _Settings(NamedTuple):
    """Arguments that are not tensors: `CodeRange` of the probabilities, heads, factor on scores."""

    qmin: int
    qmax: int
    axis: int | None
    half: bool
    num_heads: int
    factor: float


def _launch(
    name: str,
    tile_rows: int,
    qkv: tuple[Tensor, ...],
    scale: Tensor,
    others: tuple[Tensor | None, ...],
    settings: _Settings,
) -> None:
    """Run a kernel on queries, keys and values, (B, N, h*d) each.

    Args:
        name: name of the kernel.
        tile_rows: number of rows of a tile in half precision. A tile in float32 has half as many
            rows, because float32 fills twice the registers.
        qkv: queries, keys and values.
        scale: scale of the probabilities.
        others: tensor arguments of the kernel after the scale.
        settings: the other arguments.
    """
    q = qkv[0]
    if type(q) not in PLAIN_CLASSES:  # tracing only needs shapes
        return
    num_images, num_tokens, length = q.shape
    num_heads = settings.num_heads
    head_dim = length // num_heads
    tile_rows //= q.itemsize // 2
    tensors = []
    strides = []
    for x in qkv:
        x_rows, stride = with_row_stride(x, length)
        tensors.append(x_rows)
        strides.append(stride)
    fits_few_warps = q.itemsize == 2 and head_dim <= 64
    gpu._launch(
        name,
        (math.ceil(num_tokens / tile_rows), num_heads, num_images),
        (*tensors, scale.expand(num_tokens).contiguous(), *others),
        float(settings.qmax),
        settings.factor / math.log(2),
        float(settings.factor),
        num_tokens,
        *strides,
        SIZE=head_dim,
        BLOCK_D=_tile_side(head_dim),
        BLOCK_N=tile_rows,
        BLOCK_M=tile_rows if name == "attention_keys" else _tile_side(num_tokens),
        num_warps=4 if fits_few_warps else 8,
        num_stages=2,
    )


# The tile sizes below are the fastest on an H100 for heads of 64 elements and 197 tokens.
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    """`lsq_forward(softmax(factor * q k^T)) v` of each head, for inputs that `fits` accepts.

    Args:
        q: (B, N, h*d).
        k: (B, N, h*d).
        v: (B, N, h*d), like `q` and `k` in float32, bfloat16 or float16.
        scale: (N,) or (1,).
        args: the fields of `CodeRange` for the probabilities, then h, then the factor.

    Returns:
        The output (B, N, h*d), and the base-2 logarithms of the denominators of the softmax,
        (B, h, N), float32.
    """
    settings = _Settings(*args)
    num_images, num_tokens, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    log_sums = q.new_empty(num_images, settings.num_heads, num_tokens, dtype=torch.float32)
    _launch("attention_queries", 64, (q, k, v), scale, (None, log_sums, out, None, None), settings)
    return out, log_sums


def attention_backward(
    grad: Tensor, log_sums: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """Gradients of `attention_forward`.

    Args:
        grad: gradient of the first result of `attention_forward`, in the dtype of `q`.
        log_sums: the second result of `attention_forward`.
        q: (B, N, h*d).
        k: (B, N, h*d).
        v: (B, N, h*d).
        scale: (N,) or (1,).
        args: the fields of `CodeRange` for the probabilities, then h, then the factor.

    Returns:
        Gradients of `q`, `k` and `v`, and of the scale, without LSQ's factor.
    """
    settings = _Settings(*args)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.empty_like(k, memory_format=torch.contiguous_format)
    grad_v = torch.empty_like(v, memory_format=torch.contiguous_format)
    # For each row, `dots` is the term subtracted from the gradients of the probabilities, and
    # `step_grads` is the gradient of the step size.
    dots = torch.empty_like(log_sums, memory_format=torch.contiguous_format)
    step_grads = torch.empty_like(log_sums, memory_format=torch.contiguous_format)
    grad = grad.contiguous()
    query_tensors = (grad, log_sums, grad_q, dots, step_grads)
    key_tensors = (grad, log_sums, dots, grad_k, grad_v)
    _launch("attention_queries", 32, (q, k, v), scale, query_tensors, settings)
    _launch("attention_keys", 64, (q, k, v), scale, key_tensors, settings)
    return grad_q, grad_k, grad_v, step_grads.view(-1, scale.numel()).sum(0)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor scale, "
    "int qmin, int qmax, int? axis, bool half, int num_heads, float factor"
)
forward = operator(f"({_ARGUMENTS}) -> (Tensor, Tensor)")(attention_forward)
backward = operator(
    f"(Tensor grad, Tensor sums, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)(attention_backward)
