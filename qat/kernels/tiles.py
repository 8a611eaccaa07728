"""Rows of tensors cut into tiles, for Triton kernels."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from qat.kernels.rows import Layout, row_stride

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Usual number of elements in the tile of a program.
TILE = 2048
# For kernels that may divide a row into several tiles: maximum number of columns of a tile, and
# minimum number for a tile that divides the row evenly.
MAX_TILE_WIDTH = 1024
MIN_TILE_WIDTH = 64


@functools.cache
def device_type() -> str:
    """`cuda`, or `cpu` under Triton's interpreter, as in tests.

    Call this only if Triton is installed.
    """
    import triton

    return "cpu" if triton.knobs.runtime.interpret else "cuda"


def with_row_stride(x: Tensor, length: int) -> tuple[Tensor, int]:
    """Return `x` and its `row_stride`; if that is None, a contiguous copy of `x` and its stride."""
    stride = row_stride(x, length)
    if stride is None:
        return x.contiguous(), length
    return x, stride


def tiles_of(
    layout: Layout, max_row_length: int | None = None
) -> tuple[dict[str, int], tuple[int, int]]:
    """Tiles whose sides are powers of two.

    Args:
        layout: the rows to cut.
        max_row_length: a tile is as wide as a row, rounded up to a power of two, but has at most
            this many columns. None = as wide as the largest power of two that divides the length of
            a row, or if that is below `MIN_TILE_WIDTH`, as the rounded row; at most
            `MAX_TILE_WIDTH`.

    Returns:
        Rows and columns of a tile, by the names of the kernels' arguments. The number of tiles down
        and across.
    """
    columns = 1 << (layout.length - 1).bit_length()
    if max_row_length:
        columns = min(columns, max_row_length)
    else:
        divisor = layout.length & -layout.length  # the largest power of two in the length
        if divisor >= MIN_TILE_WIDTH:
            columns = divisor
        columns = min(columns, MAX_TILE_WIDTH)
    rows = min(1 << (layout.rows - 1).bit_length(), max(TILE // columns, 1))
    tiles_down = math.ceil(layout.rows / rows)
    tiles_across = math.ceil(layout.length / columns)
    return {"BLOCK_R": rows, "BLOCK_C": columns}, (tiles_down, tiles_across)
