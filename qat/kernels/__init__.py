"""LSQ and StatsQ in the form that is fastest where the tensors are: what quantizers call.

A few lines of C++ on a CPU, Triton on CUDA, and the plain tensor operations of `qat.functional` for everything else. All forms give the
same bits forward; sums in gradients differ by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.block_floats import BlockFloatFunction, BlockFormat, block_float, tensor_scale
from qat.functional.lsq import CodeRange, LSQFunction
from qat.functional.lsq import relative_step as formula_of_step
from qat.functional.statsq import StatsQFunction
from qat.functional.statsq import statsq_scale as formula_of_scale
from qat.kernels import gpu, operators
from qat.kernels.library import differentiated_once
from qat.kernels.made import Made
from qat.kernels.rows import PLAIN, LSQParams

CHOICES = ("auto", "triton", "off")
_choice = "auto"


def use(choice: str) -> None:
    """Choose kernels for this process: `auto`, `triton` = auto, but those of CUDA or an error, `off` = plain tensor operations.

    Raises:
        UsageError: an unknown choice, or Triton is not there.
    """
    global _choice  # noqa: PLW0603  (like torch's number of threads)
    if choice not in CHOICES:
        raise UsageError(f"kernels={choice!r}: must be one of {', '.join(CHOICES)}")
    if choice == "triton" and not gpu.available():
        raise UsageError(
            "kernels='triton': Triton or CUDA is not there; here it must be one of auto, off"
        )
    _choice = choice


def are_off() -> bool:
    """Whether quantizers are plain tensor operations, which can be differentiated as often as one likes, and traced by `torch.jit`.

    Raises:
        UsageError: `torch.func` is at work, whose transforms the kernels do not know.
    """
    if _choice != "off" and torch._C._are_functorch_transforms_active():
        raise UsageError(
            "torch.func: its transforms do not go through the kernels; kernels=off, qat.kernels.use('off'), takes them"
        )
    return _choice == "off" or torch.jit.is_tracing()


class _LSQ(LSQFunction):
    @staticmethod
    def forward(
        x: Tensor, scale: Any, before: Any, after: Any, sign: Any, codes: Any, grad_factor: float
    ) -> Tensor:
        return operators.lsq_forward(x, scale, before, after, sign, *codes, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        differentiated_once()
        x, scale, before, after, sign = ctx.saved_tensors
        found = operators.gradients(
            LSQParams(scale, before, after, sign, ctx.codes, ctx.grad_factor), grad, x
        )
        return *found[:4], None, None, None


def lsq(x: Tensor, q: LSQParams) -> Tensor:
    """`qat.functional.lsq`."""
    return (LSQFunction if are_off() else _LSQ).apply(x, *q)


def statsq_scale(w: Tensor) -> Tensor:
    """`qat.functional.statsq_scale`, the bits that `operators.statsq` finds."""
    return (
        operators.statsq(w.detach(), 2, w.dtype)[1]
        if w.is_cuda and not are_off()
        else formula_of_scale(w)
    )


class _StatsQ(StatsQFunction):
    @staticmethod
    def forward(w: Tensor, scale: Tensor, bits: int) -> Tensor:
        return operators.statsq_forward(w, scale, bits, w.dtype)


def statsq(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`qat.functional.statsq_with_scale`."""
    return (StatsQFunction if are_off() else _StatsQ).apply(w, scale, bits)


class _RelativeStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, change: Tensor, unit: float) -> Tensor:
        growth = change.exp()
        # Of a unit of 0 no start is below it.
        step, slope = (
            operators.step_and_slope(start, growth, change, unit) if unit else (start * growth,) * 2
        )
        ctx.save_for_backward(slope)
        return step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        differentiated_once()
        return None, grad * ctx.saved_tensors[0], None


def relative_step(start: Tensor, change: Tensor, unit: float) -> Tensor:
    """`qat.functional.relative_step` of a change that is learned, in one node, which keeps ds/dt."""
    if are_off() or type(change) not in PLAIN:
        return formula_of_step(start, change, unit)
    return _RelativeStep.apply(start, change, unit)


class _BlockFloat(BlockFloatFunction):
    @staticmethod
    def forward(x: Tensor, t: Tensor | None, form: BlockFormat) -> Tensor:
        return operators.round_blocks(x, t, None, form.bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        differentiated_once()
        x, t = ctx.saved_tensors
        return operators.round_blocks(x, t, grad, ctx.form.bits), None, None


def block_floats(x: Tensor, form: BlockFormat) -> Tensor:
    """`qat.functional.block_float`."""
    return block_float(x, form) if are_off() else _BlockFloat.apply(x, tensor_scale(x, form), form)


__all__ = ["CodeRange", "LSQParams", "Made", "operators"]
