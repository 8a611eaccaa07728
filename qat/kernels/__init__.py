"""LSQ, StatsQ and block floats for quantizers, by the fastest kernels for the device.

These are C++ kernels on a CPU, Triton kernels on CUDA (none for block floats), and the tensor
operations of `qat.functional` elsewhere. In float32, all implementations return bit-identical
results in the forward pass, except that fused attention and StatsQ's scale on CUDA differ by
rounding. Sums in gradients also differ by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.block_floats import (
    BlockFloatFunction,
    BlockFormat,
    block_float,
    compute_tensor_scale,
)
from qat.functional.lsq import CodeRange, LSQFunction
from qat.functional.lsq import relative_step as reference_step
from qat.functional.statsq import StatsQFunction
from qat.functional.statsq import statsq_scale as reference_scale
from qat.kernels import gpu, operators
from qat.kernels.library import check_not_double_backward
from qat.kernels.producer import Producer
from qat.kernels.rows import PLAIN_CLASSES, LSQParams

CHOICES = ("auto", "triton", "off")
_choice = "auto"


def use(choice: str) -> None:
    """Choose kernels for this process.

    Args:
        choice: `auto` = the fastest for each device; `triton` = as auto, but with an error if the
            kernels for CUDA are not available; `off` = tensor operations of torch.

    Raises:
        UsageError: `choice` is unknown, or is `triton` where the kernels for CUDA do not work.
    """
    global _choice  # noqa: PLW0603  (like torch's number of threads)
    if choice not in CHOICES:
        raise UsageError(f"kernels={choice!r}: must be one of {', '.join(CHOICES)}")
    if choice == "triton" and not gpu.available():
        raise UsageError(
            "kernels='triton': the kernels for CUDA do not work here; must be one of auto, off"
        )
    _choice = choice


def are_off() -> bool:
    """True if quantizers use plain torch operations instead of kernels.

    Torch operations can be differentiated any number of times, and traced by `torch.jit`.

    Raises:
        UsageError: kernels are on inside a transform of `torch.func`, which they do not support.
    """
    if _choice != "off" and torch._C._are_functorch_transforms_active():
        raise UsageError(
            "torch.func: kernels do not support transforms such as vmap and jvp; set kernels=off "
            "(in Python, qat.kernels.use('off'))"
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
        check_not_double_backward()
        x, scale, before, after, sign = ctx.saved_tensors
        params = LSQParams(scale, before, after, sign, ctx.codes, ctx.grad_factor)
        grads = operators.gradients(params, grad, x)
        return grads.x, grads.scale, grads.before, grads.after, None, None, None


def lsq(x: Tensor, q: LSQParams) -> Tensor:
    """`qat.functional.lsq`, computed by a kernel where possible."""
    function = LSQFunction if are_off() else _LSQ
    return function.apply(x, *q)


def statsq_scale(w: Tensor) -> Tensor:
    """`qat.functional.statsq_scale`; with kernels on, the scale of `operators.statsq`."""
    if not w.is_cuda or are_off():
        return reference_scale(w)
    _, scale = operators.statsq(w.detach(), 2, w.dtype)
    return scale


class _StatsQ(StatsQFunction):
    @staticmethod
    def forward(w: Tensor, scale: Tensor, bits: int) -> Tensor:
        return operators.statsq_forward(w, scale, bits, w.dtype)


def statsq(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`qat.functional.statsq_with_scale`, computed by a kernel where possible."""
    function = StatsQFunction if are_off() else _StatsQ
    return function.apply(w, scale, bits)


class _RelativeStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, change: Tensor, min_reliable: float) -> Tensor:
        growth = change.exp()
        if min_reliable:
            step, slope = operators.step_and_slope(start, growth, change, min_reliable)
        else:
            # No initial step size is below 0, so `relative_step` is start * exp(change).
            step = start * growth
            slope = step
        ctx.save_for_backward(slope)
        return step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        check_not_double_backward()
        (slope,) = ctx.saved_tensors
        return None, grad * slope, None


def relative_step(start: Tensor, change: Tensor, min_reliable: float) -> Tensor:
    """`qat.functional.relative_step`, as one autograd node where possible."""
    if are_off() or type(change) not in PLAIN_CLASSES:
        return reference_step(start, change, min_reliable)
    return _RelativeStep.apply(start, change, min_reliable)


class _BlockFloat(BlockFloatFunction):
    @staticmethod
    def forward(x: Tensor, tensor_scale: Tensor | None, form: BlockFormat) -> Tensor:
        return operators.round_blocks(x, tensor_scale, None, form.bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        check_not_double_backward()
        x, tensor_scale = ctx.saved_tensors
        return operators.round_blocks(x, tensor_scale, grad, ctx.form.bits), None, None


def block_floats(x: Tensor, form: BlockFormat) -> Tensor:
    """`qat.functional.block_float`, computed by a kernel where possible."""
    if are_off():
        return block_float(x, form)
    return _BlockFloat.apply(x, compute_tensor_scale(x, form), form)


__all__ = ["CodeRange", "LSQParams", "Producer", "operators"]
