"""What fused Functions share: when they may run, how they are given quantizers, what they keep for backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat import kernels
from qat.functional.lsq import LsqGradients
from qat.kernels import LSQParams
from qat.kernels.rows import PLAIN


def can_fuse(x: Tensor) -> bool:
    """False where kernels are off, `x` has no values, or somebody watches functions of torch, as counts of products do."""
    is_plain = type(x) in PLAIN and not x.is_meta
    return not kernels.are_off() and is_plain and torch._C._len_torch_function_stack() == 0


def keep(ctx: Any, *args: Any) -> None:
    """Save for backward what `kept` gives back: tensors the way that torch wants it, the rest beside."""
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args))
    ctx.rest = tuple(None if isinstance(x, Tensor) else x for x in args)


def kept(ctx: Any) -> list[Any]:
    """See `keep`. To be asked once: under checkpointing it is gone afterwards."""
    return [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.rest, strict=True)]


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast, if it is on, makes of the factors of a product; else the dtype of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def probs_dtype(x: Tensor) -> torch.dtype:
    """Float32 under autocast, which on a CPU would not ask that of a softmax; else the dtype of `x`."""
    is_cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.float32 if is_cast else x.dtype


def flat(parts: Iterable[tuple[Any, ...]]) -> Any:
    """Quantizers as a Function is given them, one after the other."""
    return (t for part in parts for t in part)


def params(args: Any) -> list[LSQParams]:
    """What `flat` made of LSQ quantizers."""
    size = len(LSQParams._fields)
    return [LSQParams(*args[i : i + size]) for i in range(0, len(args), size)]


def of_params(found: Iterable[LsqGradients]) -> Any:
    """Gradients of what `flat` made of LSQ quantizers."""
    return flat((*one[1:4], None, None, None) for one in found)


def quantizer_gradient(grads: LsqGradients) -> Any:
    """Gradients of a quantizer as a Function returns them."""
    return gradient_of(LSQParams, scale=grads.scale, before=grads.before, after=grads.after)


def gradient_of(kind: type[Any], **gradients: Any) -> Any:
    """Gradients of some fields of a NamedTuple of inputs, None for the other fields."""
    return kind(*[gradients.get(name) for name in kind._fields])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in the dtype of `x`, which `weight` has."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
