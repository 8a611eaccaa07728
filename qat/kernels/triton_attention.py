"""Attention with quantized probabilities: programs keep scores in registers.

A program processes a tile of queries or keys of one head and image; the grid of programs is (tiles,
heads, images). Forward and backward compute a probability by the same operations, from the base-2
logarithm of the softmax's denominator, so the codes are the same in all passes. `factor` includes
the factor that turns a power of e into a power of 2. `probs_in_steps` are probabilities times the
reciprocal of the step size. Matrix products are accumulated in float32. `grad_factor` is `factor`
without the factor that turns a power of e into a power of 2.

The `rows` of an image are consecutive in memory, and so are images, with `stride` elements from one
row to the next. A head has SIZE elements of each row; they fit in a tile of BLOCK_D columns.
`triton_kernels` describes the conventions of all kernels.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from qat.kernels.triton_kernels import (
    _clamp,
    _is_inside,
    _lsq_gradients,
    _offsets,
    _round,
    _step_size,
)


@triton.jit
def _read(
    x: tensor, row: tensor, rows: tensor, stride: tensor, SIZE: constexpr, BLOCK_D: constexpr
) -> tensor:
    """Read rows of the program's head and image; elements outside of these are zero."""
    column = tl.arange(0, BLOCK_D)
    offsets = _offsets(tl.program_id(2) * rows + row, tl.program_id(1) * SIZE + column, stride)
    return tl.load(x + offsets, mask=_is_inside(row, column, rows, SIZE), other=0.0)


@triton.jit
def _write(
    x: tensor, tile: tensor, row: tensor, rows: tensor, SIZE: constexpr, BLOCK_D: constexpr
) -> None:
    """Write a tile to rows of the program's head and image in a contiguous tensor."""
    column = tl.arange(0, BLOCK_D)
    offsets = _offsets(
        tl.program_id(2) * rows + row, tl.program_id(1) * SIZE + column, tl.num_programs(1) * SIZE
    )
    tl.store(x + offsets, tile, mask=_is_inside(row, column, rows, SIZE))


@triton.jit
def _score_row(row: tensor, rows: tensor) -> tensor:
    """Index of a row of the program's head and image in a tensor (images, heads, rows)."""
    return (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * rows + row


@triton.jit
def _product(a: tensor, b: tensor) -> tensor:
    # Tensor cores round float32 to 11 bits; a sum of three products is as exact as float32 itself.
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _probs(scores: tensor, log_sum: tensor, inverse_step: tensor) -> tuple[tensor, tensor]:
    """Probabilities of scores, and these probabilities divided by the step size."""
    probs = tl.exp2(scores - log_sum)
    return probs, probs * inverse_step


@triton.jit
def attention_queries(  # noqa: PLR0913  (a kernel gets all addresses and strides)
    q: tensor,
    k: tensor,
    v: tensor,
    scale: tensor,
    grad: tensor,
    log_sums: tensor,
    out: tensor,
    dots: tensor,
    step_grads: tensor,
    high: tensor,
    factor: tensor,
    grad_factor: tensor,
    rows: tensor,
    q_stride: tensor,
    k_stride: tensor,
    v_stride: tensor,
    SIZE: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
    BLOCK_M: constexpr,
) -> None:
    """Process a tile of queries and all keys: forward, or backward if `grad` is not None.

    Forward writes the result to `out`, and to `log_sums`, (images, heads, rows), the base-2
    logarithm of the softmax's denominator for each row. `scale` is (rows,).
    Backward gets the gradient of the result as `grad`, reads `log_sums`, and writes the gradient of
    `q` to `out`. It also writes tensors shaped like `log_sums`: `dots`, the terms subtracted from
    the gradients of the rows' probabilities, and `step_grads`, gradients of the step size by row.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    score_row = _score_row(n, rows)
    inside = n < rows
    k_tile = _read(k, m, rows, k_stride, SIZE, BLOCK_D)
    q_tile = _read(q, n, rows, q_stride, SIZE, BLOCK_D)
    scores = _product(q_tile, tl.trans(k_tile)) * factor
    scores = tl.where((m < rows)[None, :], scores, float("-inf"))
    if grad is None:
        highest = tl.max(scores, 1)
        log_sum = highest + tl.log2(tl.sum(tl.exp2(scores - highest[:, None]), 1))
        tl.store(log_sums + score_row, log_sum, mask=inside)
    else:
        log_sum = tl.load(log_sums + score_row, mask=inside, other=0.0)
    step = _step_size(scale, n, inside)[:, None]
    probs, probs_in_steps = _probs(scores, log_sum[:, None], tl.div_rn(1.0, step))
    v_tile = _read(v, m, rows, v_stride, SIZE, BLOCK_D)
    if grad is None:
        probs_q = _round(_clamp(probs_in_steps, None, high)) * step
        _write(out, _product(probs_q.to(v_tile.dtype), v_tile), n, rows, SIZE, BLOCK_D)
    else:
        grad_tile = _read(grad, n, rows, tl.num_programs(1) * SIZE, SIZE, BLOCK_D)
        grad_probs_q = _product(grad_tile, tl.trans(v_tile))
        grad_probs, step_grad_terms, _ = _lsq_gradients(
            grad_probs_q, probs_in_steps, None, high, HALF=False
        )
        dot = tl.sum(grad_probs * probs, 1)
        tl.store(step_grads + score_row, tl.sum(step_grad_terms, 1), mask=inside)
        tl.store(dots + score_row, dot, mask=inside)
        grad_scores = (grad_probs - dot[:, None]) * probs
        grad_q = _product(grad_scores.to(k_tile.dtype), k_tile) * grad_factor
        _write(out, grad_q, n, rows, SIZE, BLOCK_D)


@triton.jit
def attention_keys(  # noqa: PLR0913
    q: tensor,
    k: tensor,
    v: tensor,
    scale: tensor,
    grad: tensor,
    log_sums: tensor,
    dots: tensor,
    grad_k: tensor,
    grad_v: tensor,
    high: tensor,
    factor: tensor,
    grad_factor: tensor,
    rows: tensor,
    q_stride: tensor,
    k_stride: tensor,
    v_stride: tensor,
    SIZE: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
    BLOCK_M: constexpr,
) -> None:
    """Compute the gradients of a tile of keys and values, after `attention_queries` wrote `dots`.

    Tiles of scores have the shape (keys, queries).
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_tile = _read(k, m, rows, k_stride, SIZE, BLOCK_D)
    v_tile = _read(v, m, rows, v_stride, SIZE, BLOCK_D)
    grad_keys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, rows, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        score_row = _score_row(n, rows)
        inside = n < rows
        q_tile = _read(q, n, rows, q_stride, SIZE, BLOCK_D)
        grad_tile = _read(grad, n, rows, tl.num_programs(1) * SIZE, SIZE, BLOCK_D)
        # With an infinite sum, probabilities of rows outside of the image are zero.
        log_sum = tl.load(log_sums + score_row, mask=inside, other=float("inf"))[None, :]
        step = _step_size(scale, n, inside)[None, :]
        scores = _product(k_tile, tl.trans(q_tile)) * factor
        probs, probs_in_steps = _probs(scores, log_sum, tl.div_rn(1.0, step))
        grad_probs_q = _product(v_tile, tl.trans(grad_tile))
        grad_probs, _, codes = _lsq_gradients(grad_probs_q, probs_in_steps, None, high, HALF=False)
        grad_values += _product((codes * step).to(grad_tile.dtype), grad_tile)
        dot = tl.load(dots + score_row, mask=inside, other=0.0)[None, :]
        grad_scores = (grad_probs - dot) * probs
        grad_keys += _product(grad_scores.to(q_tile.dtype), q_tile)
    _write(grad_k, grad_keys * grad_factor, m, rows, SIZE, BLOCK_D)
    _write(grad_v, grad_values, m, rows, SIZE, BLOCK_D)
