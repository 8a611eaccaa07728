"""What a fused Function is given of an LSQ quantizer and of where it runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat import kernels
from qat.errors import UsageError
from qat.functional.lsq import gradient_scale
from qat.kernels import CodeRange, LsqGradients, Made, Steps, operators
from qat.kernels.rows import PLAIN


class LSQParams(NamedTuple):
    """An LSQ quantizer with its offsets.

    Attributes:
        scale: (n,), see `qat.functional.lsq`.
        before: offset in front, over the last dimension, or None.
        after: offset after it, over the last dimension, or None.
        codes: codes and axis.
        grad_factor: factor on the gradient of the scale.
    """

    scale: Tensor
    before: Tensor | None
    after: Tensor | None
    codes: CodeRange
    grad_factor: float

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Fake-quantize `x` as the factor of a product in `dtype`: rounded to the dtype of `x`, then to that."""
        return operators.lsq_forward(x, *self[:3], None, *self.codes, through(x, dtype)).to(dtype)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        *,
        out: Tensor | None = None,
        with_after: bool = True,
        in_place: bool = False,
        dequantized: torch.dtype | None = None,
        norm: tuple[Tensor | None, Tensor | None] = (None, None),
        made: Made = Made(),  # noqa: B008  (a tuple)
        rows: int | None = None,
    ) -> LsqGradients:
        """Gradients, that of the scale complete.

        Args:
            grad: of the result of `forward`.
            x: its argument.
            out: takes the gradient of `x`. None = new, in the dtype of `x`.
            with_after: whether to sum up that of the offset after it; else it is None.
            in_place: whether `grad` may take the gradient of `x`, which it does if it has its dtype.
            dequantized: the dtype in which to give the result of `forward` as well; None = not.
            norm: see `operators.lsq_gradients`, as the next.
            made: how the argument of `forward` was made of `x`.
            rows: how many rows of `x` (..., rows, C) there are without padding, which LSQ's factor does not count; None = all.
        """
        out = grad if in_place and grad.dtype == x.dtype else out
        shape = self.after.shape if self.after is not None and with_after else None
        q, levels = Steps(*self[:3], None, self.codes), None if dequantized is None else through(x, dequantized)
        found = operators.lsq_gradients(grad, x, q, after_shape=shape, out=out, dequantized=levels, norm=norm, made=made)
        if dequantized is not None and found.dequantized is not None:
            found = found._replace(dequantized=found.dequantized.to(dequantized))
        return found._replace(
            scale=(found.scale * gradient_scale(x if rows is None else x[..., :rows, :], self.codes, self.grad_factor)).to(self.scale.dtype)
        )


def through(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a quantized `x` is rounded to on its way to `dtype`: the dtype of `x`, unless that is float32, which rounds nothing."""
    return dtype if x.dtype == torch.float32 else x.dtype


def can_fuse(x: Tensor) -> bool:
    """False where kernels are off, or somebody watches functions of torch, as counts of products do."""
    return not kernels.are_off() and type(x) in PLAIN and torch._C._len_torch_function_stack() == 0


def keep(ctx: Any, *args: Any) -> None:
    """Save for backward what `kept` gives back: tensors the way that torch wants it, the rest beside."""
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args))
    ctx.rest = tuple(None if isinstance(x, Tensor) else x for x in args)


def kept(ctx: Any) -> list[Any]:
    """See `keep`. To be asked once: under checkpointing it is gone afterwards."""
    return [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.rest, strict=True)]


def differentiated_once() -> None:
    """Raise `UsageError` in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise UsageError(
            "create_graph=True: kernels are differentiated once; kernels=off, qat.kernels.use('off'), is as often as one likes"
        )


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast, if it is on, makes of the factors of a product; else the dtype of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def probs_dtype(x: Tensor) -> torch.dtype:
    """Float32 under autocast, which on a CPU would not ask that of a softmax; else the dtype of `x`."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
