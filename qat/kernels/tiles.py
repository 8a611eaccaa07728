"""Tensors as Triton's kernels see them: which ones fit, and how their rows are cut into tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qat.kernels.rows import PLAIN, Layout, row_stride

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements of the tile that a program holds, and columns at most.
TILE, WIDEST = 2048, 1024


class Tiles(NamedTuple):
    """How a tensor is cut.

    Attributes:
        block: rows and columns of a tile, as the kernels call them.
        down: tiles below each other.
        across: tiles beside each other.
    """

    block: dict[str, int]
    down: int
    across: int


@functools.cache
def device_type() -> str:
    """`cuda`, or `cpu` where Triton's interpreter stands in for a device, as in tests. Triton has to be there."""
    import triton

    return "cpu" if triton.knobs.runtime.interpret else "cuda"


def fit(*tensors: Tensor | None) -> bool:
    """True for plain float tensors on one device of the right kind."""
    present = [x for x in tensors if x is not None]
    device = present[0].device
    return device.type == device_type() and all(type(x) in PLAIN and x.dtype in DTYPES and x.device == device for x in present)


def dense(*tensors: Tensor | None) -> bool:
    """True if the elements of each lie one after the other."""
    return all(x is None or x.is_contiguous() for x in tensors)


def spaced(x: Tensor, length: int) -> tuple[Tensor, int]:
    """`x`, copied if need be, and the elements from one row of `length` to the next."""
    stride = row_stride(x, length)
    return (x.contiguous(), length) if stride is None else (x, stride)


def tiles_of(layout: Layout, widest: int = WIDEST) -> Tiles:
    """Tiles with powers of two as sides; `widest` = columns at most."""
    columns = min(1 << (layout.length - 1).bit_length(), widest)
    rows = min(1 << (layout.rows - 1).bit_length(), max(TILE // columns, 1))
    return Tiles({"BLOCK_R": rows, "BLOCK_C": columns}, -(-layout.rows // rows), -(-layout.length // columns))
