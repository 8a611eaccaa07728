"""Factors of products while a net is written as a graph: codes that can be seen in another shape and be multiplied, nothing else.

The net runs twice. The first time, on an image, a factor carries what is known of it before any image (scale, shift, offset) in whatever
shape the net gives it, and each product works out what of that stands outside of its sum (`plan.py`). The second time torch traces the
net: a factor is codes of 8 bits alone, and each product writes the operators that were worked out for it (`write.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.export.stored_weights import Stored
from qat.model.frozen import FrozenWeight
from qat.model.frozen.coded import QuantizedTensor, handled_by


class Graph(Protocol):
    """What makes numbers and products of factors, one way at each of the two times."""

    def number(self, x: Factor) -> Tensor:
        """The float32 numbers that a factor stands for."""

    def weight_number(self, weight: WeightCodes) -> Tensor:
        """The float32 weight, (out, in) or (out, in, kh, kw)."""

    def product(self, a: Any, b: Any, bias: Tensor | None = None) -> Tensor:
        """Matrix product and bias, float32; b as a `WeightCodes` is turned."""


@dataclass(frozen=True, kw_only=True)
class Factor(QuantizedTensor):
    """The value (codes + shift) * scale + after.

    Attributes:
        codes: the first time float32 whole numbers; the second time int8 or uint8, from which `zero` is still to be taken.
        scale, shift, after: the shape of `codes`, views where they repeat themselves, the last two None = 0. The second time all are None.
        zero: code that stands for 0.
        graph: what makes products of it.
    """

    shift: Tensor | None = None
    zero: Tensor | None = None
    graph: Graph

    def seen(self, view: Callable[[Tensor], Tensor]) -> Factor:
        """The same in another shape."""
        scale, shift, after = (None if t is None else view(t) for t in (self.scale, self.shift, self.after))
        rest = {"name": self.name, "shift": shift, "zero": self.zero, "graph": self.graph}
        return Factor(view(self.codes), scale, after, self.bound, **rest)  # type: ignore[arg-type]

    def value(self) -> Tensor:
        """Its numbers, float32."""
        return self.graph.number(self)

    def __matmul__(self, other: Any) -> Tensor:
        return _matmul(self, other)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return handled_by(_HANDLED, func)(*args, **(kwargs or {}))


@dataclass(frozen=True)
class WeightCodes:
    """A weight.

    Attributes:
        frozen: its quantizer.
        form: how it is stored.
        graph: as of `Factor`.
    """

    frozen: FrozenWeight
    form: Stored
    graph: Graph

    def value(self) -> Tensor:
        """Its numbers, float32."""
        return self.graph.weight_number(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return handled_by(_HANDLED, func)(*args, **(kwargs or {}))


def number(t: Any) -> Tensor:
    """What a factor stands for; a tensor as it is."""
    found: Tensor = t.value() if isinstance(t, Factor | WeightCodes) else t
    return found


def _matmul(a: Any, b: Any) -> Tensor:
    graph: Graph = (a if isinstance(a, Factor) else b).graph
    return graph.product(a, b)


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, WeightCodes) and isinstance(x, Factor):
        return x.graph.product(x, weight, bias)
    return F.linear(number(x), number(weight), bias)


def _on_numbers(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(*(number(one) for one in args), **kwargs)


_HANDLED: dict[Any, Callable[..., Any]] = {
    # A norm between a quantizer and a product, and convolutions, for which no runtime has a kernel that takes codes and gives numbers.
    **{function: _on_numbers(function) for function in (F.layer_norm, F.rms_norm, F.conv2d)},
    F.linear: _linear,
    F.dropout: lambda x, *_, **__: x,
    **dict.fromkeys((torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
}
