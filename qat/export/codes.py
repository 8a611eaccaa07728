"""Tensors of codes while a net is written as a graph: they can be seen in another shape and be multiplied, nothing else.

The net runs twice. The first time, on an image, a tensor carries what is known of it before any image (scale, shift, offset) in whatever
shape the net gives it, and each product works out what of that stands outside of its sum (`plan.py`). The second time torch traces the
net: a tensor is codes of 8 bits alone, and each product writes the operators that were worked out for it (`write.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import UsageError
from qat.model.frozen import FrozenWeight
from qat.model.sites import iter_quantizers

# By the width of a stored type, the opset from which a Cast takes it.
OPSETS = {2: 25, 4: 21, 8: 13}
# Kernels of x86 processors without VNNI add two products of uint8 and int8 in 16 bits, which saturates beyond 32,767. Two products with a
# code of at most this size fit: 2 * 255 * 64 = 32,640. uint8 times uint8 has kernels that do not saturate.
LARGEST_INT8 = 64
_VIEWS = frozenset({
    "transpose",
    "permute",
    "flatten",
    "unflatten",
    "unsqueeze",
    "repeat_interleave",
    "narrow",
    "chunk",
})


class _OnCodes:
    """Products of codes go to their graph; all else, as norms and convolutions, takes numbers: no runtime has a kernel on codes."""

    graph: Any

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _HANDLED:
            args = [number(one) for one in args]
        return _HANDLED.get(func, func)(*args, **(kwargs or {}))


@dataclass(frozen=True)
class QuantizedTensor(_OnCodes):
    """The value (codes + shift) * scale + after.

    Attributes:
        codes: the first time float32 whole numbers; the second time int8 or uint8, from which `zero` is still to be subtracted.
        scale, shift, after: the shape of `codes`, views where they repeat themselves; None the second time, `after` also for 0.
        name: of the quantizer.
        zero: code that stands for 0.
        graph: makes numbers and products of it: `plan.Planner` the first time, `write.Writer` the second.
    """

    codes: Tensor
    scale: Any
    shift: Any
    after: Tensor | None
    name: str
    zero: Tensor
    graph: Any

    dtype = torch.float32

    def __getattr__(self, name: str) -> Any:
        if name in {"shape", "ndim", "device"}:
            return getattr(self.codes, name)
        if name not in _VIEWS:
            raise AttributeError(f"{name} is not done on codes: must be a view or a product")
        return lambda *args, **kwargs: self._viewed(lambda t: getattr(t, name)(*args, **kwargs))

    def _viewed(self, view: Callable[[Tensor], Any]) -> Any:
        views: list[Any] = []
        for tensor in (self.codes, self.scale, self.shift, self.after):
            views.append(None if tensor is None else view(tensor))
        if not isinstance(views[0], tuple):
            return self._with(*views)
        pieces = []
        for i in range(len(views[0])):
            pieces.append(self._with(*(None if piece is None else piece[i] for piece in views)))
        return tuple(pieces)

    def _with(self, codes: Any, scale: Any, shift: Any, after: Any) -> QuantizedTensor:
        return QuantizedTensor(codes, scale, shift, after, self.name, self.zero, self.graph)

    def __matmul__(self, other: Any) -> Any:
        return _matmul(self, other)


def number(t: Any) -> Any:
    """What codes stand for; a tensor as it is."""
    return t.graph.number(t) if isinstance(t, _OnCodes) else t


def _matmul(a: Any, b: Any) -> Any:
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return a.graph.product(a, b)
    return torch.matmul(number(a), number(b))


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, QuantizedTensor) and isinstance(weight, StoredWeight):
        return x.graph.product(x, weight, bias)
    return F.linear(number(x), number(weight), bias)


_HANDLED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.dropout: lambda x, *_, **__: x,
    **dict.fromkeys(
        (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul
    ),
}


@dataclass(frozen=True)
class StoredWeight(_OnCodes):
    """A frozen weight as (factors - zero_point) * scale + constant, with factors of 8 bits: the codes, or 2 * codes + 1.

    Attributes:
        frozen: the weight.
        width: of the ONNX type of the stored codes, in bits.
        codes: int8 that fit it; uint8, 128 more, where int8 could saturate (`LARGEST_INT8`).
        is_doubled: the factors are 2 * codes + 1.
        scale: (n,), a scale a row, or (1,).
        zero_point: (n,) or (1,), the type of `codes`, or None = 0.
        constant: (n,), what is added to a row: half a step of 8-bit StatsQ, or what bias correction adds; None = 0.
        graph: as of `QuantizedTensor`; None before a graph is written.
    """

    frozen: FrozenWeight
    width: int
    codes: Tensor
    is_doubled: bool
    scale: Tensor
    zero_point: Tensor | None
    constant: Tensor | None
    graph: Any = None

    @property
    def factors(self) -> Tensor:
        """What products take, float32: whole numbers without their zero point, the shape of the weight."""
        factors = self.codes.float() * 2 + 1 if self.is_doubled else self.codes.float()
        return (
            factors
            if self.zero_point is None
            else factors - _rows(self.zero_point.float(), factors)
        )

    @property
    def value(self) -> Tensor:
        """The weight, float32."""
        value = self.factors * _rows(self.scale, self.codes)
        return value if self.constant is None else value + _rows(self.constant, value)


def _rows(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (like.ndim - 1))


def store_weights(
    form: str, net: nn.Module, smallest: int, cpu: str = "fast"
) -> dict[str, StoredWeight]:
    """The weights of a frozen net by their names, each as `store_weight` has it.

    Raises:
        UsageError: the net has floats in blocks, for which no runtime has kernels on a CPU.
    """
    for site in iter_quantizers(net):
        if site.quantizer.in_blocks:
            why = f"{site.name} has blocks of {site.quantizer.spec.quantizer}, which its runtimes do not run on a CPU"
            raise UsageError(f"format={form}: {why}; must be format=packed")
    weights = {
        name: module for name, module in net.named_modules() if isinstance(module, FrozenWeight)
    }
    return {name: store_weight(weight, smallest, cpu) for name, weight in weights.items()}


def store_weight(weight: FrozenWeight, smallest: int = 4, cpu: str = "fast") -> StoredWeight:
    """Choose the smallest type that holds a weight exactly, and that is read where its file is to run. Facts: docs/deployment.md.

    The levels of half-step grids (StatsQ, SEQ) lie half a step size beside those of an integer type: products take the odd numbers 2k+1
    in place of k. They are stored so where they fit the type that the width needs anyway (2 and 3 bits in INT4, 5 to 7 in INT8), else they
    are made of k when the file is opened (4 bits; 2 in INT2). At 8 bits they do not fit: k, with half a step size added.

    Args:
        weight: frozen.
        smallest: width of the smallest type that may be used: 2, 4, which OpenVINO reads, or 8, which TensorRT does.
        cpu: `any` stores codes beyond `LARGEST_INT8` as uint8; `fast` stores all as int8.
    """
    bits, signed = weight.spec.bits, weight.stored.dtype == torch.int8
    size = next(width for width in OPSETS if width >= max(bits, smallest))
    below = 0 if signed else 2 ** (bits - 1)
    codes, shift, scale, constant = (
        weight.stored.to(torch.int16) - below,
        weight.shift + below,
        weight.scale,
        weight.after,
    )
    zero_point, is_doubled = None, False
    if not bool((shift % 1 != 0).any()):
        zero_point = (-shift).to(torch.int8) if bool(shift.any()) else None
    elif bits < 8 and bool((shift == 0.5).all()):
        scale, is_doubled = scale / 2, bits == size  # 2k + 1 takes a bit more
        codes = codes if is_doubled else 2 * codes + 1
    else:
        constant = scale * shift if constant is None else constant + scale * shift
    can_saturate = size == 8 and bool((codes.abs() > LARGEST_INT8).any())
    if cpu == "any" and can_saturate:
        codes = codes + 128
        zero_point = 128 + (torch.zeros(1) if zero_point is None else zero_point.float())
        return StoredWeight(
            weight,
            size,
            codes.to(torch.uint8),
            is_doubled,
            scale,
            zero_point.to(torch.uint8),
            constant,
        )
    return StoredWeight(weight, size, codes.to(torch.int8), is_doubled, scale, zero_point, constant)
