"""Tensors in the integer domain: codes, with the scales beside them, which no product sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.model.frozen.products import Product, UnsupportedIntegerOp, int_matmul, note


def _view(name: str) -> Callable[..., QuantizedTensor]:
    """The method of that name of a tensor, which shows it in another shape."""
    return lambda self, *args, **kwargs: self.seen(lambda t: getattr(t, name)(*args, **kwargs))


@dataclass(frozen=True)
class QuantizedTensor:
    """The value codes * scale + after, of which products read the codes alone.

    It stands in for a tensor between a quantizer and the products that take its result. It can be seen in another shape, and be
    multiplied; everything else raises `UnsupportedIntegerOp`, so nothing in a net can fall back to float numbers unnoticed.

    Attributes:
        codes: whole numbers, int32. Those of StatsQ are the odd numbers 2k+1, with half its step as the scale.
        scale: float32, the shape of `codes`, a view where it repeats itself.
        after: offset behind the quantizer, the shape of `codes`; None = 0.
        bound: largest magnitude that a code can have.
        name: of the quantizer.
    """

    codes: Tensor
    scale: Tensor
    after: Tensor | None
    bound: int
    name: str = ""

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, after: Tensor | None, bound: int, name: str = "") -> QuantizedTensor:
        """From a scale and an offset that broadcast against the codes."""
        behind = None if after is None else after.float().expand(codes.shape)
        return cls(codes.to(torch.int32), scale.float().expand(codes.shape), behind, bound, name)

    def value(self) -> Tensor:
        """The numbers that it stands for, float32."""
        x = self.codes * self.scale
        return x if self.after is None else x + self.after

    def seen(self, view: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """The same in another shape."""
        after = None if self.after is None else view(self.after)
        return QuantizedTensor(view(self.codes), view(self.scale), after, self.bound, self.name)

    @property
    def shape(self) -> torch.Size:
        """Of the codes."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.codes.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that it stands for."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    def chunk(self, chunks: int, dim: int = 0) -> tuple[QuantizedTensor, ...]:
        """As of a tensor."""
        size = math.ceil(self.shape[dim] / chunks)
        return tuple(self.narrow(dim, at, min(size, self.shape[dim] - at)) for at in range(0, self.shape[dim], size))

    transpose = _view("transpose")
    permute = _view("permute")
    flatten = _view("flatten")
    unflatten = _view("unflatten")
    unsqueeze = _view("unsqueeze")
    repeat_interleave = _view("repeat_interleave")
    narrow = _view("narrow")

    def __matmul__(self, other: QuantizedTensor | Tensor) -> Tensor:
        return multiplied(self, other)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return handled_by(_HANDLED, func)(*args, **(kwargs or {}))


def handled_by(table: Mapping[Any, Callable[..., Any]], func: Any) -> Callable[..., Any]:
    """What a table has for a function of torch; raises `UnsupportedIntegerOp` if that is nothing."""
    if func not in table:
        raise UnsupportedIntegerOp(f"{getattr(func, '__name__', func)} is not done on codes: must be a view or a product")
    return table[func]


def multiplied(a: QuantizedTensor | Tensor, b: QuantizedTensor | Tensor) -> Tensor:
    """The product of (..., N, K) and (..., K, M): of the codes in integers, the scales outside; float32.

    Offsets behind quantizers meet the other factor in float numbers: constant rows, of no size beside the product. Where one factor was
    never quantized, there is nothing to do in integers.
    """
    if not (isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor)):
        return torch.matmul(*(t.value() if isinstance(t, QuantizedTensor) else t for t in (a, b)))
    out = _of_codes(a, b)
    if a.after is not None:
        out = out + torch.matmul(_once(a.after, -2), b.value())
    if b.after is not None:
        out = out + torch.matmul(a.codes * a.scale, _once(b.after, -1))
    return out


def _once(t: Tensor, dim: int) -> Tensor:
    """One row or column of a view that repeats it."""
    return t.narrow(dim, 0, 1) if t.stride(dim) == 0 and t.shape[dim] else t


def _of_codes(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    across = _shared(b.scale, -2)
    if across is None:
        raise _inside(b)
    along = _shared(a.scale, -1)
    if along is not None:
        return _product(a, b, a.codes, b.codes) * (along * across)
    # Few groups with a scale each, as the colours of an image: an integer product for each.
    row = a.scale.flatten(0, -2)[:1]
    if not torch.equal(a.scale, row.expand_as(a.scale)):
        raise _inside(a)
    groups = [(value, (row[0] == value).nonzero().squeeze(1)) for value in row[0].unique()]
    return sum(_product(a, b, a.codes[..., at], b.codes[..., at, :]) * (value * across) for value, at in groups)


def _inside(factor: QuantizedTensor) -> UnsupportedIntegerOp:
    return UnsupportedIntegerOp(
        f"{factor.name}: its scale changes along the summed dimension; codes allow scales that can stand outside of it"
    )


def _shared(scale: Tensor, dim: int) -> Tensor | None:
    """The scale without a dimension along which it stays the same (of size 1 then); None where it does not."""
    one = scale.narrow(dim, 0, 1)
    return one if scale.stride(dim) == 0 or torch.equal(scale, one.expand_as(scale)) else None


def _product(a: QuantizedTensor, b: QuantizedTensor, left: Tensor, right: Tensor) -> Tensor:
    out = int_matmul(left, right)
    note(Product(a.name, b.name, left.shape[-1], a.bound, b.bound), out)
    return out


def _linear(x: QuantizedTensor | Tensor, weight: QuantizedTensor | Tensor, bias: Tensor | None = None) -> Tensor:
    out = multiplied(x, weight.transpose(0, 1))
    return out if bias is None else out + bias


def _conv2d(  # noqa: PLR0913, PLR0917  (torch's signature)
    x: QuantizedTensor | Tensor,
    weight: QuantizedTensor | Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution as a product of patches (B, groups, positions, n) and kernels (groups, n, out)."""
    if not (isinstance(x, QuantizedTensor) and isinstance(weight, QuantizedTensor)):
        x, weight = (t.value() if isinstance(t, QuantizedTensor) else t for t in (x, weight))
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    (sh, sw), (dh, dw) = (_pair(n) for n in (stride, dilation))
    kh, kw = weight.shape[-2:]
    if (dh, dw) != (1, 1) or isinstance(padding, str):
        raise UnsupportedIntegerOp(f"{weight.name}: convolutions of codes have dilation 1 and padding in numbers")
    ph, pw = _pair(padding)
    padded = _padded(x, (pw, pw, ph, ph))
    patches = padded.seen(lambda t: t.unfold(2, kh, sh).unfold(3, kw, sw))  # (B, I, H', W', kh, kw)
    rows, columns = patches.shape[2:4]
    patches = patches.seen(lambda t: t.unflatten(1, (groups, -1)).permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(2, 3))
    kernels = weight.seen(lambda t: t.flatten(1).unflatten(0, (groups, -1)).transpose(1, 2))
    out = multiplied(patches, kernels).transpose(-2, -1).flatten(1, 2).unflatten(-1, (rows, columns))
    return out if bias is None else out + bias.view(-1, 1, 1)


def _padded(x: QuantizedTensor, by: tuple[int, int, int, int]) -> QuantizedTensor:
    """Zeros around an image (B, C, H, W): the code 0 without an offset."""
    if not any(by):
        return x
    one = x.scale[..., :1, :1]
    if not torch.equal(x.scale, one.expand_as(x.scale)):
        raise UnsupportedIntegerOp(f"{x.name}: a scale that changes from pixel to pixel cannot be padded")
    codes = F.pad(x.codes, by)
    return QuantizedTensor(codes, one.expand(codes.shape), None if x.after is None else F.pad(x.after, by), x.bound, x.name)


def _pair(n: Any) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else tuple(n)


def _dropout(x: QuantizedTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> QuantizedTensor:  # noqa: FBT001, FBT002  (torch's signature)
    if training and p:
        raise UnsupportedIntegerOp("dropout is not done on codes: put the net into evaluation mode")
    return x


def _on_numbers(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A norm between a quantizer and a product: what leaves it is quantized no more."""
    return lambda x, *args, **kwargs: function(x.value(), *args, **kwargs)


_HANDLED: dict[Any, Callable[..., Any]] = {
    **{norm: _on_numbers(norm) for norm in (F.layer_norm, F.rms_norm)},
    F.linear: _linear,
    F.conv2d: _conv2d,
    F.dropout: _dropout,
    torch.matmul: multiplied,
    torch.Tensor.matmul: multiplied,
    torch.Tensor.__matmul__: multiplied,
    torch.bmm: multiplied,
}
