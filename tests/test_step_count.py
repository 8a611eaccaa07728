"""Counting of a training step without a GPU. Oracle: bytes and kernels of single operations, worked out by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step_count import ROWS, TINY, Count, Counting, build, counted, cuda_branches, is_readable
from qat import kernels
from qat.kernels import CodeRange
from qat.kernels.rows import PLAIN

N = 4 * 6


def count(function, *shapes, dtype=torch.float32):
    found = Count()
    with FakeTensorMode(), cuda_branches(found):
        given = [torch.empty(shape, dtype=dtype) for shape in shapes]
        with Counting(found):
            function(*given)
    return found.bytes, found.kernels, found.triton


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, b: a + b, ((4, 6), (4, 6)), (3 * 4 * N, 1, 0)),
        (lambda a, b: a + b, ((4, 6), (6,)), (2 * 4 * N + 24, 1, 0)),
        (lambda a: a.t().unsqueeze(0).expand(3, -1, -1), ((4, 6),), (0, 0, 0)),
        (lambda a: a.to(torch.bfloat16), ((4, 6),), (6 * N, 1, 0)),
        (lambda a, b: a.copy_(b), ((4, 6), (4, 6)), (2 * 4 * N, 1, 0)),
        (lambda a, b: a @ b.t(), ((4, 6), (4, 6)), (2 * 4 * N + 4 * 16, 1, 0)),
        # Read in strides; a factor without rows or columns in one piece is copied in front.
        (lambda a, b: torch.bmm(a[:, :, :3], b[:, :3]), ((2, 4, 6), (2, 6, 4)), (4 * (24 + 24 + 32), 1, 0)),
        (lambda a, b: torch.bmm(a[:, :, ::2], b[:, :3]), ((2, 4, 6), (2, 6, 4)), (4 * (24 + 24 + 32) + 4 * 48, 2, 0)),
    ],
)
def test_operations(function, shapes, expected):
    assert count(function, *shapes) == expected


def test_our_kernels_write_what_they_are_asked_for():
    codes = CodeRange(-2, 1, 0)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        found = count(lambda x, s, d=dtype: kernels.lsq_forward(x, s, None, None, codes, dtype=d), (4, 6), (4,))
        assert found == (4 * N + 4 * 4 + size * N, 1, 1)


def test_factors_that_are_read_where_they_lie():
    x = torch.empty(5, 7, 12)
    assert is_readable(x[..., 4:8])
    assert is_readable(x[..., 4:8].transpose(1, 2))
    assert not is_readable(x[..., ::2])


def test_a_step_of_each_row_moves_more_than_the_float_step():
    found = {name: counted(build("deit_tiny_patch16_224", arm, **TINY, depth=1), 2) for name, arm in ROWS.items()}
    assert min(found, key=lambda name: found[name].bytes) == "float"
    assert found["float"].triton == 0
    assert all(one.triton > 10 for name, one in found.items() if name != "float")
    assert {torch.Tensor, torch.nn.Parameter} == PLAIN
