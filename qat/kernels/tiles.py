"""Tensors as Triton's kernels see them: which ones fit, and how their rows are cut into tiles."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qat.kernels.rows import Layout, row_stride

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements of the tile that a program holds, columns at most, and columns from which on a tile need not be as wide as a row.
TILE, WIDEST, NARROW = 2048, 1024, 64


@functools.cache
def device_type() -> str:
    """`cuda`, or `cpu` where Triton's interpreter stands in for a device, as in tests. Triton has to be there."""
    import triton

    return "cpu" if triton.knobs.runtime.interpret else "cuda"


def spaced(x: Tensor, length: int) -> tuple[Tensor, int]:
    """`x`, copied if need be, and the elements from one row of `length` to the next."""
    stride = row_stride(x, length)
    return (x.contiguous(), length) if stride is None else (x, stride)


def tiles_of(layout: Layout, whole: int | None = None) -> tuple[dict[str, int], tuple[int, int]]:
    """Tiles with powers of two as sides.

    Args:
        layout: what is cut.
        whole: columns at most, where a tile has to be as wide as a row; None = as many as leave no tile half empty.

    Returns:
        Rows and columns of a tile, as the kernels call them; how many tiles are below, and how many beside each other.
    """
    columns, even = 1 << (layout.length - 1).bit_length(), layout.length & -layout.length
    columns = min(columns, whole) if whole else min(even if even >= NARROW else columns, WIDEST)
    rows = min(1 << (layout.rows - 1).bit_length(), max(TILE // columns, 1))
    return {"BLOCK_R": rows, "BLOCK_C": columns}, (
        -(-layout.rows // rows),
        -(-layout.length // columns),
    )
