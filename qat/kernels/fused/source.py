"""How a tensor was made, noted on the tensor itself: who needs it in backward can keep what it was made of, which is kept anyway."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.lsq import LsqGradients
from qat.kernels.fused.operand import gradient_of
from qat.kernels.library import operator
from qat.kernels.made import Made
from qat.kernels.rows import PLAIN

_NOTE = "qat_source"


class Source(NamedTuple):
    """What gave the tensor.

    Attributes:
        tensors: input, weight and bias of the operation, as far as it has them.
        made: the operation.
        version: those of the tensor and of the input, added; another sum means that somebody has written into one since.
    """

    tensors: tuple[Tensor, Tensor | None, Tensor | None]
    made: Made
    version: int

    def __reduce__(self) -> tuple[type[torch.Size], tuple[()]]:
        """Saved with a tensor as an empty one: what it was made of may be large; `torch.load` takes a Size with `weights_only`."""
        return torch.Size, ()


def remember(
    made: Tensor, how: Made, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Note on `made` what it is made of, all of which somebody keeps for backward already.

    Returns:
        `made`.
    """
    version = (
        0 if torch.compiler.is_compiling() else made._version + x._version
    )  # which a graph cannot ask for
    setattr(made, _NOTE, Source((x, weight, bias), how, version))
    return made


@operator("(Tensor x) -> ()")
def check_unwritten(x: Tensor) -> None:
    """Raise `UsageError` while a graph is made in which `x` was written into since it was made, whose note would be wrong."""
    if x._version and type(x) not in PLAIN:
        raise UsageError(
            "compile: a net writes in place into what a LayerNorm or GELU gave; must be false, or the net's x.mul_(2) x = x * 2"
        )


def _source(x: Tensor) -> Source | None:
    """The note of `x`, if nobody has written into it, or wants to see its gradient, since."""
    note: Source | None = getattr(x, _NOTE, None)
    if not note:
        return None
    if torch.compiler.is_compiling():
        check_unwritten(x)
        return note
    return (
        None
        if note.version != x._version + note.tensors[0]._version
        or x.retains_grad
        or x._backward_hooks
        else note
    )


def unflattened(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`x.unflatten(dim, sizes)`, a dimension before the last, which keeps the note of `x`."""
    made, note = x.unflatten(dim, sizes), _source(x)
    return (
        made
        if note is None
        else remember(made, note.made, note.tensors[0].unflatten(dim, sizes), *note.tensors[1:])
    )


class FunctionInput(NamedTuple):
    """The input of a fused Function, and the tensor that it was computed from.

    Attributes:
        result: what the Function quantizes, without gradient; None where that is `origin` itself.
        origin: the tensor that is saved for backward and gets the gradient.
        norm_weight: weight of the LayerNorm between the two, or None.
        norm_bias: bias of the LayerNorm, or None.
        made: the operation between the two.
    """

    result: Tensor | None
    origin: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    made: Made

    @property
    def value(self) -> Tensor:
        """What the Function quantizes."""
        return self.origin if self.result is None else self.result


def source_gradient(grads: LsqGradients) -> Any:
    """Gradients of a `FunctionInput` as a Function returns them."""
    return gradient_of(
        FunctionInput, origin=grads.x, norm_weight=grads.norm_weight, norm_bias=grads.norm_bias
    )


def given(x: Tensor) -> FunctionInput:
    """`x` as a fused Function receives it."""
    source = _source(x)
    if source is None:
        return FunctionInput(None, x, None, None, Made())
    origin, weight, bias = source.tensors
    return FunctionInput(x.detach(), origin, weight, bias, source.made)
