"""Notes on tensors that name the operation and the tensors that they were computed from.

If the input of a fused Function has such a note, the Function saves the input of the noted
operation, which autograd saves anyway, and recomputes its own input in backward.
"""

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
    """Operation and tensors that a tensor was computed from.

    Attributes:
        tensors: input, weight and bias of the operation; None for each that it does not have.
        producer: the operation.
        version: sum of the version counters of the tensor and the input. If the sum differs later,
            one of the two tensors was written to.
    """

    tensors: tuple[Tensor, Tensor | None, Tensor | None]
    producer: Made
    version: int

    def __reduce__(self) -> tuple[type[torch.Size], tuple[()]]:
        """Pickle as an empty `torch.Size`, which `weights_only` allows: tensors may be large."""
        return torch.Size, ()


def remember(
    out: Tensor,
    producer: Made,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Note on `out` from which tensors it was computed; autograd has to save them anyway.

    Args:
        out: result of the operation.
        producer: the operation.
        x: input of the operation.
        weight: weight of the operation, or None.
        bias: bias of the operation, or None.

    Returns:
        `out`.
    """
    version = 0
    if not torch.compiler.is_compiling():  # version counters would break the graph
        version = out._version + x._version
    setattr(out, _NOTE, Source((x, weight, bias), producer, version))
    return out


@operator("(Tensor x) -> ()")
def check_unwritten(x: Tensor) -> None:
    """Raise `UsageError` if the traced graph wrote into `x` after `x` got its note."""
    if x._version and type(x) not in PLAIN:
        raise UsageError(
            "compile: a net writes in place into the output of a LayerNorm or GELU; must be false, "
            "or the net must compute x = x * 2 in place of x.mul_(2)"
        )


def _source(x: Tensor) -> Source | None:
    """The note of `x`; None if `x` was written to since, retains its gradient or has hooks."""
    note: Source | None = getattr(x, _NOTE, None)
    if not note:  # an unpickled note is empty
        return None
    if torch.compiler.is_compiling():
        check_unwritten(x)
        return note
    was_written = note.version != x._version + note.tensors[0]._version
    if was_written or x.retains_grad or x._backward_hooks:
        return None
    return note


def unflattened(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`x.unflatten(dim, sizes)` with the note of `x`; `dim` must not be the last dimension."""
    out = x.unflatten(dim, sizes)
    note = _source(x)
    if note is None:
        return out
    origin, weight, bias = note.tensors
    return remember(out, note.producer, origin.unflatten(dim, sizes), weight, bias)


class FunctionInput(NamedTuple):
    """The input of a fused Function, and the tensor that it was computed from.

    Attributes:
        result: the tensor to quantize, without gradient; None if it is `origin` itself.
        origin: the tensor that is saved for backward and gets the gradient.
        norm_weight: weight of the LayerNorm if it is this operation, or None.
        norm_bias: bias of the LayerNorm, or None.
        producer: the operation from `origin` to `result`.
    """

    result: Tensor | None
    origin: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    producer: Made

    @property
    def value(self) -> Tensor:
        """The tensor that the Function quantizes."""
        return self.origin if self.result is None else self.result


def source_gradient(grads: LsqGradients) -> Any:
    """Gradients of a `FunctionInput` as a Function returns them."""
    return gradient_of(
        FunctionInput, origin=grads.x, norm_weight=grads.norm_weight, norm_bias=grads.norm_bias
    )


def function_input(x: Tensor) -> FunctionInput:
    """Wrap `x` and its origin for a fused Function."""
    source = _source(x)
    if source is None:
        return FunctionInput(None, x, None, None, Made())
    origin, weight, bias = source.tensors
    return FunctionInput(x.detach(), origin, weight, bias, source.producer)
