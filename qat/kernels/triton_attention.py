"""Attention whose probabilities are quantized: a program has a tile of queries or keys of one head and image, and scores stay inside.

All passes make a probability by the same operations, from the base-2 logarithm of its row's sum, so that they see the same codes; `factor`
holds what turns a power of e into one of 2, and a probability in steps is its product with the reciprocal of the step. Products add up in
float32; `triton_kernels` says the rest. Programs are (tiles, heads, images). The `rows` of an image follow each other, and images too,
with `stride` elements from one row to the next; SIZE of these belong to a head, which a tile of BLOCK_D holds.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from qat.kernels.triton_kernels import _clamped, _errors, _inside, _places, _rounded, _step


@triton.jit
def _read(
    x: tensor, row: tensor, rows: tensor, stride: tensor, SIZE: constexpr, BLOCK_D: constexpr
) -> tensor:
    """Rows of the program's head and image, zero where there are none."""
    column = tl.arange(0, BLOCK_D)
    places = _places(tl.program_id(2) * rows + row, tl.program_id(1) * SIZE + column, stride)
    return tl.load(x + places, mask=_inside(row, column, rows, SIZE), other=0.0)


@triton.jit
def _write(
    x: tensor, tile: tensor, row: tensor, rows: tensor, SIZE: constexpr, BLOCK_D: constexpr
) -> None:
    """To a tensor of nothing but these heads."""
    column = tl.arange(0, BLOCK_D)
    places = _places(
        tl.program_id(2) * rows + row, tl.program_id(1) * SIZE + column, tl.num_programs(1) * SIZE
    )
    tl.store(x + places, tile, mask=_inside(row, column, rows, SIZE))


@triton.jit
def _place(row: tensor, rows: tensor) -> tensor:
    """Of what there is one of for each image, head and row."""
    return (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * rows + row


@triton.jit
def _product(a: tensor, b: tensor) -> tensor:
    # Tensor cores round float32 to 11 bits; a sum of three products is as exact as float32 itself.
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _in_steps(s: tensor, total: tensor, inverse: tensor) -> tuple[tensor, tensor]:
    """Probabilities of scores, and the same in steps."""
    p = tl.exp2(s - total)
    return p, p * inverse


@triton.jit
def attention_queries(  # noqa: PLR0913  (a kernel is given where everything lies)
    q: tensor,
    k: tensor,
    v: tensor,
    scale: tensor,
    g: tensor,
    sums: tensor,
    out: tensor,
    dots: tensor,
    errors: tensor,
    high: tensor,
    factor: tensor,
    gradient: tensor,
    rows: tensor,
    q_stride: tensor,
    k_stride: tensor,
    v_stride: tensor,
    SIZE: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
    BLOCK_M: constexpr,
) -> None:
    """A tile of queries and all keys: forward, or, with a gradient `g` of its result, backward; `out` takes the result or that of `q`.

    Of each row, `sums` takes the base-2 logarithm of its sum; in backward, which reads that, `dots` what is subtracted from the gradients
    of its probabilities, and `errors` its part in the gradient of its step.
    """
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    place, inside = _place(n, rows), n < rows
    k_tile = _read(k, m, rows, k_stride, SIZE, BLOCK_D)
    s = _product(_read(q, n, rows, q_stride, SIZE, BLOCK_D), tl.trans(k_tile)) * factor
    s = tl.where((m < rows)[None, :], s, float("-inf"))
    if g is None:
        highest = tl.max(s, 1)
        total = highest + tl.log2(tl.sum(tl.exp2(s - highest[:, None]), 1))
        tl.store(sums + place, total, mask=inside)
    else:
        total = tl.load(sums + place, mask=inside, other=0.0)
    step = _step(scale, n, inside)[:, None]
    p, u = _in_steps(s, total[:, None], tl.div_rn(1.0, step))
    v_tile = _read(v, m, rows, v_stride, SIZE, BLOCK_D)
    if g is None:
        level = _rounded(_clamped(u, None, high)) * step
        _write(out, _product(level.to(v_tile.dtype), v_tile), n, rows, SIZE, BLOCK_D)
    else:
        dp = _product(_read(g, n, rows, tl.num_programs(1) * SIZE, SIZE, BLOCK_D), tl.trans(v_tile))
        inner, wrong, _ = _errors(dp, u, None, high, HALF=False)
        dot = tl.sum(inner * p, 1)
        tl.store(errors + place, tl.sum(wrong, 1), mask=inside)
        tl.store(dots + place, dot, mask=inside)
        ds = (inner - dot[:, None]) * p
        _write(out, _product(ds.to(k_tile.dtype), k_tile) * gradient, n, rows, SIZE, BLOCK_D)


@triton.jit
def attention_keys(  # noqa: PLR0913
    q: tensor,
    k: tensor,
    v: tensor,
    scale: tensor,
    g: tensor,
    sums: tensor,
    dots: tensor,
    dk: tensor,
    dv: tensor,
    high: tensor,
    factor: tensor,
    gradient: tensor,
    rows: tensor,
    q_stride: tensor,
    k_stride: tensor,
    v_stride: tensor,
    SIZE: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,
    BLOCK_M: constexpr,
) -> None:
    """Backward for a tile of keys and values, down all queries; what is (queries, keys) elsewhere is (keys, queries) here."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_tile, v_tile = (
        _read(k, m, rows, k_stride, SIZE, BLOCK_D),
        _read(v, m, rows, v_stride, SIZE, BLOCK_D),
    )
    of_keys = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    of_values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(0, rows, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        place, inside = _place(n, rows), n < rows
        q_tile = _read(q, n, rows, q_stride, SIZE, BLOCK_D)
        g_tile = _read(g, n, rows, tl.num_programs(1) * SIZE, SIZE, BLOCK_D)
        # An infinite sum makes the probabilities of a row that is not there zero.
        total = tl.load(sums + place, mask=inside, other=float("inf"))[None, :]
        step = _step(scale, n, inside)[None, :]
        p, u = _in_steps(_product(k_tile, tl.trans(q_tile)) * factor, total, tl.div_rn(1.0, step))
        inner, _, code = _errors(_product(v_tile, tl.trans(g_tile)), u, None, high, HALF=False)
        of_values += _product((code * step).to(g_tile.dtype), g_tile)
        ds = (inner - tl.load(dots + place, mask=inside, other=0.0)[None, :]) * p
        of_keys += _product(ds.to(q_tile.dtype), q_tile)
    _write(dk, of_keys * gradient, m, rows, SIZE, BLOCK_D)
    _write(dv, of_values, m, rows, SIZE, BLOCK_D)
