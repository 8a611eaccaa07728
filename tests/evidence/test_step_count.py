"""Counting of a training step without a GPU. Oracle: bytes and kernels of single operations, worked out by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evidence.speed.step_count import (
    ROWS,
    Count,
    Counting,
    counted,
    cuda_branches,
)
from evidence.speed.steps import TINY, build
from qat.kernels import CodeRange
from qat.kernels.rows import PLAIN_CLASSES
from tests.kernels import calls

N = 4 * 6


def lsq(x, scale):
    return calls.lsq_forward(x, scale, None, None, CodeRange(-2, 1, 0), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, b: a + b, ((4, 6), (6,)), (2 * 4 * N + 24, 1, 0)),
        (lambda a: a.t().unsqueeze(0).expand(3, -1, -1), ((4, 6),), (0, 0, 0)),
        (lambda a: a.to(torch.bfloat16), ((4, 6),), (6 * N, 1, 0)),
        (lambda a, b: a.copy_(b), ((4, 6), (4, 6)), (2 * 4 * N, 1, 0)),
        # Read in strides; a factor without rows or columns in one piece is copied before.
        (
            lambda a, b: torch.bmm(a[:, :, :3], b[:, :3]),
            ((2, 4, 6), (2, 6, 4)),
            (4 * (24 + 24 + 32), 1, 0),
        ),
        (
            lambda a, b: torch.bmm(a[:, :, ::2], b[:, :3]),
            ((2, 4, 6), (2, 6, 4)),
            (4 * (24 + 24 + 32) + 4 * 48, 2, 0),
        ),
        # Ours writes what it is asked for.
        (lsq, ((4, 6), (4,)), (4 * N + 4 * 4 + 2 * N, 1, 1)),
    ],
)
def test_operations(function, shapes, expected):
    found = Count()
    with FakeTensorMode(), cuda_branches(found):
        given = [torch.empty(shape) for shape in shapes]
        with Counting(found):
            function(*given)
    assert (found.bytes, found.kernels, found.triton) == expected


@pytest.mark.long
def test_a_step_of_each_row_moves_more_than_the_float_step():
    images = torch.randn(2, 3, TINY["img_size"], TINY["img_size"])
    found = {
        name: counted(
            build("deit_tiny_patch16_224", arm, images, **TINY, depth=1), 2, TINY["img_size"]
        )
        for name, arm in ROWS.items()
    }
    assert min(found, key=lambda name: found[name].bytes) == "float"
    assert found["float"].triton == 0
    assert all(one.triton > 10 for name, one in found.items() if name != "float")
    assert {torch.Tensor, torch.nn.Parameter} == PLAIN_CLASSES
