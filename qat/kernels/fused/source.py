"""Record on a tensor the operation and the tensors that the tensor was computed from.

If the input of a fused Function has such a record, called its source, the Function saves the input
of the recorded operation, which autograd saves anyway. In backward, the Function recomputes its own
input.

In the autograd graph, the Function then depends on the recorded tensors, not on its own input. To
get a gradient of this input in eager mode, call `retain_grad` on it before the Function runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.lsq import LsqGradients
from qat.kernels.fused.operand import gradient_of
from qat.kernels.library import operator
from qat.kernels.producer import Producer
from qat.kernels.rows import PLAIN_CLASSES

# Name of the tensor attribute that contains the source.
_ATTRIBUTE = "qat_source"


class Source(NamedTuple):
    """The operation and the tensors that a tensor was computed from.

    Attributes:
        tensors: input, weight and bias of the operation; None instead of a missing weight or bias.
        producer: the operation.
        version: sum of the version counters of the tensor and of the input; it grows if one of the
            two is written to. Always 0 in compiled graphs.
    """

    tensors: tuple[Tensor, Tensor | None, Tensor | None]
    producer: Producer
    version: int

    def __reduce__(self) -> tuple[type[torch.Size], tuple[()]]:
        """Pickle as an empty `torch.Size`, which `weights_only` allows: tensors may be large."""
        return torch.Size, ()


def attach_source(
    out: Tensor,
    producer: Producer,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attach to `out` a record of the tensors that `out` was computed from.

    Autograd saves these tensors anyway.

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
    setattr(out, _ATTRIBUTE, Source((x, weight, bias), producer, version))
    return out


@operator("(Tensor x) -> ()")
def check_unwritten(x: Tensor) -> None:
    """Raise `UsageError` if the traced graph wrote into `x` after its source was attached."""
    if x._version and type(x) not in PLAIN_CLASSES:
        raise UsageError(
            "compile=true: the model writes in place into the output of a LayerNorm or GELU; must "
            "be false, unless the model is changed to compute x = x * 2 instead of x.mul_(2)"
        )


def _valid_source(x: Tensor) -> Source | None:
    """The source of `x`.

    Returns None if `x` has no source, retains its gradient or has hooks, or if `x` or the input of
    the operation was written to after the source was attached. In compiled graphs, returns None
    only if `x` has no source.

    Raises:
        UsageError: see `check_unwritten`.
    """
    source: Source | None = getattr(x, _ATTRIBUTE, None)
    if not source:  # an unpickled source is empty
        return None
    if torch.compiler.is_compiling():
        check_unwritten(x)
        return source
    was_written = source.version != x._version + source.tensors[0]._version
    if was_written or x.retains_grad or x._backward_hooks:
        return None
    return source


def unflattened(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`x.unflatten(dim, sizes)` with the source of `x`, if any; `dim` must not be the last one."""
    out = x.unflatten(dim, sizes)
    source = _valid_source(x)
    if source is None:
        return out
    origin, weight, bias = source.tensors
    return attach_source(out, source.producer, origin.unflatten(dim, sizes), weight, bias)


class FunctionInput(NamedTuple):
    """The input of a fused Function, and the tensor that is saved for backward.

    Attributes:
        result: the tensor to quantize, without gradient; None if `origin` is to be quantized.
        origin: the tensor that is saved for backward and gets the gradient.
        norm_weight: weight of the LayerNorm that computed `result` from `origin`, or None.
        norm_bias: bias of this LayerNorm, or None.
        producer: the operation that computed `result` from `origin`.
    """

    result: Tensor | None
    origin: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    producer: Producer

    @property
    def value(self) -> Tensor:
        """The tensor that the Function quantizes."""
        return self.origin if self.result is None else self.result


def source_gradient(grads: LsqGradients) -> Any:
    """Gradients of a `FunctionInput`, in the order in which a Function returns them."""
    return gradient_of(
        FunctionInput, origin=grads.x, norm_weight=grads.norm_weight, norm_bias=grads.norm_bias
    )


def function_input(x: Tensor) -> FunctionInput:
    """Wrap `x`, and the tensors of its source, if any, for a fused Function."""
    source = _valid_source(x)
    if source is None:
        return FunctionInput(None, x, None, None, Producer())
    origin, weight, bias = source.tensors
    return FunctionInput(x.detach(), origin, weight, bias, source.producer)
