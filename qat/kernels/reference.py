"""What every form of the kernels has to give: the formulas of `qat.functional`; and whether one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.functional.block_floats import BLOCK_FORMATS, BlockFormat
from qat.functional.block_floats import round_blocks as formula_of_blocks
from qat.functional.lsq import CodeRange, lsq_backward, lsq_forward
from qat.functional.statsq import statsq_forward
from qat.kernels.made import Made
from qat.kernels.rows import LSQParams

__all__ = ["agrees", "lsq_backward", "lsq_forward", "round_blocks", "statsq_forward"]


def block_format(t: Tensor | None, bits: int) -> BlockFormat:
    """That with a scale `t` of the tensor, or without."""
    return BLOCK_FORMATS["mxfp" if t is None else "nvfp4", bits]


def round_blocks(x: Tensor, t: Tensor | None, grad: Tensor | None, bits: int) -> Tensor:
    """`qat.functional.block_floats.round_blocks`."""
    return formula_of_blocks(x, block_format(t, bits), t, grad)


@torch.no_grad()
def agrees(
    forward: Callable[..., Any], backward: Callable[..., Any], device: str, *grids: CodeRange
) -> bool:
    """Whether forms of LSQ's passes give the bits of the formulas, but for sums: in and out of range, halfway between codes.

    Args:
        forward: of `cpu` or `gpu`, as the next.
        backward: see there.
        device: where to try them.
        grids: what to try, for tensors (3, 4, 37).
    """
    x = torch.linspace(-9, 9, 4 * 37 * 3, device=device, dtype=torch.float32).reshape(3, 4, 37)
    scale, offset = (
        torch.tensor([0.5, 1.0, 0.3, 2.0], device=device, dtype=torch.float32),
        x.flatten()[:37],
    )
    for codes in grids:
        q, of_x = LSQParams(scale, offset, offset, None, codes), torch.empty_like(x)
        sums = backward(x, x, q, of_x, torch.float32, None, None, Made(), with_after=False)
        expected, wanted = (
            lsq_backward(x, x, scale, offset, codes),
            lsq_forward(x, scale, offset, offset, codes),
        )
        same = (
            sums is not None
            and torch.allclose(sums[0], expected.scale, rtol=1e-4, atol=1e-3)
            and torch.equal(of_x, expected.x)
        )
        if not (
            same
            and torch.equal(sums[2], wanted)
            and torch.equal(forward(x, *q[:4], *codes, torch.float32), wanted)
        ):
            return False
    return True
