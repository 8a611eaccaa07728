"""Helpers for the fused Functions of `qat.kernels.fused`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat import kernels
from qat.functional.lsq import LsqGradients
from qat.kernels import LSQParams
from qat.kernels.rows import PLAIN_CLASSES


def can_fuse(x: Tensor) -> bool:
    """True if kernels are on, `x` is a plain tensor, and no mode intercepts torch functions.

    Tensors on the meta device and of subclasses other than `Parameter` are not plain.

    Raises:
        UsageError: kernels are on inside a transform of `torch.func`.
    """
    is_plain_tensor = type(x) in PLAIN_CLASSES and not x.is_meta
    return not kernels.are_off() and is_plain_tensor and torch._C._len_torch_function_stack() == 0


def save_for_backward(ctx: Any, *args: Any) -> None:
    """Save tensors and other objects for backward, which gets them from `load_saved`."""
    tensors: list[Tensor | None] = []
    others: list[Any] = []
    for arg in args:
        is_tensor = isinstance(arg, Tensor)
        tensors.append(arg if is_tensor else None)
        others.append(None if is_tensor else arg)
    ctx.save_for_backward(*tensors)
    ctx.saved_others = tuple(others)


def load_saved(ctx: Any) -> list[Any]:
    """The arguments of `save_for_backward`.

    Call this once: activation checkpointing frees the tensors after the first call.
    """
    args = []
    for tensor, other in zip(ctx.saved_tensors, ctx.saved_others, strict=True):
        args.append(other if tensor is None else tensor)
    return args


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the factors of a matrix product: that of autocast if it is on, else that of `x`."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def probs_dtype(x: Tensor) -> torch.dtype:
    """Dtype of probabilities: float32 under autocast, else the dtype of `x`.

    Left to itself, autocast computes a softmax in half precision on CPUs.
    """
    is_cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.float32 if is_cast else x.dtype


def flatten_params(parts: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Concatenate the fields of several quantizers, to pass them as arguments to a Function."""
    fields: list[Any] = []
    for part in parts:
        fields.extend(part)
    return fields


def split_params(args: Any) -> list[LSQParams]:
    """Rebuild LSQ quantizers from the fields that `flatten_params` returned."""
    size = len(LSQParams._fields)
    return [LSQParams(*args[i : i + size]) for i in range(0, len(args), size)]


def split_fields(args: Any, *kinds: type[Any]) -> list[Any]:
    """Rebuild one NamedTuple of each kind from its fields, in order.

    Returns:
        The NamedTuples, and last a sequence of the remaining arguments.
    """
    parts = []
    for kind in kinds:
        size = len(kind._fields)
        parts.append(kind(*args[:size]))
        args = args[size:]
    return [*parts, args]


def quantizer_gradient(grads: LsqGradients) -> Any:
    """Gradients of a quantizer, in the order in which a Function returns them."""
    return gradient_of(LSQParams, scale=grads.scale, before=grads.before, after=grads.after)


def gradient_of(kind: type[Any], **gradients: Any) -> Any:
    """A NamedTuple of inputs with gradients in the named fields, and None in the other fields."""
    return kind(*[gradients.get(name) for name in kind._fields])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of `x` and a `weight` of the same dtype; the bias is cast to this dtype."""
    if bias is not None:
        bias = bias.to(x.dtype)
    return F.linear(x, weight, bias)
