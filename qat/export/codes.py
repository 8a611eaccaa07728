"""Tensors of codes that stand in for a model's tensors while the model is written as a graph.

Views and products work on the codes; all other operators get plain numbers. For target `cpu`, the
model runs twice. The first run is on an image: a tensor carries its scale, shift and offset, which
follow every view of the tensor, and each product determines which of the three can be applied
outside its sum (`plan.py`). In the second run, torch traces the model: a tensor has only 8-bit
codes, and each product writes the operators that were planned for it (`write.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import UsageError
from qat.model.frozen import FrozenFp8, FrozenWeight
from qat.model.sites import iter_quantizers
from qat.utils.validate import FP8

TENSORRT = "onnx format.target=tensorrt"
# Minimum opset whose Cast accepts the stored type, by the width of the type.
OPSETS = {2: 25, 4: 21, 8: 13}
# On x86 processors without VNNI, kernels add two products of uint8 and int8 in 16 bits, which
# saturate beyond 32,767. Two products fit if the int8 code is at most MAX_INT8_CODE: 2 * 255 * 64 =
# 32,640. Kernels for uint8 times uint8 do not saturate.
MAX_INT8_CODE = 64
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


class _CodeTensor:
    """Passes products of codes to the tensor's `graph`, and skips dropout.

    Other operators, such as norms, get plain numbers because no runtime computes them on codes.
    """

    graph: Any

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        return func(*[dequantize(argument) for argument in args], **kwargs)


@dataclass(frozen=True)
class QuantizedTensor(_CodeTensor):
    """Tensor with the value (codes + shift) * scale + after.

    Attributes:
        codes: in the first run the quantizer's input, in place of codes; in the second run the sum
            of codes and `zero`, int8 or uint8.
        scale, shift, after: tensors of the shape of `codes`, expanded if values repeat; None in the
            second run. `after` is also None if it is 0.
        name: name of the quantizer.
        zero: 8-bit code that products subtract: `plan.integer_zero_point` plus `plan.code_offset`.
        graph: computes numbers and products: `plan.Planner` in the first run, `write.Writer` in the
            second.
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
            raise AttributeError(f"{name} is not supported on codes: must be a view or a product")

        def view(*args: Any, **kwargs: Any) -> Any:
            return self._apply_view(lambda t: getattr(t, name)(*args, **kwargs))

        return view

    def _apply_view(self, view: Callable[[Tensor], Any]) -> Any:
        """Apply a view to all tensors; the result is a tuple of tensors if the view splits them."""
        views: list[Any] = []
        for tensor in (self.codes, self.scale, self.shift, self.after):
            views.append(None if tensor is None else view(tensor))
        codes = views[0]
        if not isinstance(codes, tuple):
            return self._with(*views)
        pieces = []
        for i in range(len(codes)):
            parts = [None if chunks is None else chunks[i] for chunks in views]
            pieces.append(self._with(*parts))
        return tuple(pieces)

    def _with(self, codes: Any, scale: Any, shift: Any, after: Any) -> QuantizedTensor:
        return QuantizedTensor(codes, scale, shift, after, self.name, self.zero, self.graph)

    def __matmul__(self, other: Any) -> Any:
        return _matmul(self, other)


def dequantize(t: Any) -> Any:
    """The numbers that codes represent; any other argument is returned unchanged."""
    return t.graph.dequantize(t) if isinstance(t, _CodeTensor) else t


def _matmul(a: Any, b: Any) -> Any:
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return a.graph.product(a, b)
    return torch.matmul(dequantize(a), dequantize(b))


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, QuantizedTensor) and isinstance(weight, StoredWeight):
        return x.graph.product(x, weight, bias)
    return F.linear(dequantize(x), dequantize(weight), bias)


def _dropout(x: Any, *_: Any, **__: Any) -> Any:
    return x


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.dropout: _dropout,
    torch.matmul: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
}


@dataclass(frozen=True)
class StoredWeight(_CodeTensor):
    """A frozen weight as (factors - zero_point) * scale + constant.

    The factors fit 8 bits: the codes, or 2 * codes + 1.

    Attributes:
        frozen: the frozen weight.
        width: bits of the ONNX type of the stored codes.
        codes: int8 codes that fit the type, or E4M3 floats. With `cpu=any`, if int8 could saturate
            (`MAX_INT8_CODE`), uint8 codes that are 128 higher.
        is_doubled: True = the factors are 2 * codes + 1; False = they are the codes.
        scale: (n,), one scale per row, or (1,).
        zero_point: (n,) or (1,), with the dtype of `codes`; None = 0.
        constant: (n,) or (1,), added to each row: half a step size for 8-bit StatsQ, SEQ or DoReFa,
            plus the offset after the quantizer, for example of bias correction; None = 0.
        graph: see `QuantizedTensor` or `write.TensorRT`; None before a graph is written.
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
    def centred_factors(self) -> Tensor:
        """`factors - zero_point` of the formula above: float32, in the weight's shape."""
        factors = self.codes.float()
        if self.is_doubled:
            factors = factors * 2 + 1
        if self.zero_point is not None:
            factors = factors - _one_per_row(self.zero_point.float(), factors)
        return factors

    @property
    def value(self) -> Tensor:
        """The float32 weight."""
        value = self.centred_factors * _one_per_row(self.scale, self.codes)
        if self.constant is not None:
            value = value + _one_per_row(self.constant, value)
        return value


def _one_per_row(t: Tensor, like: Tensor) -> Tensor:
    """View a number for each row (n,) as (n, 1, ...), to broadcast with a weight."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def store_weights(
    form: str, net: nn.Module, min_width: int, cpu: str = "fast"
) -> dict[str, StoredWeight]:
    """Call `store_weight` for all weights of a frozen model; return the results by name.

    `form` is the format that messages name; only `TENSORRT` allows 8-bit floats.

    Raises:
        UsageError: the model has blocks of floats; or it has 8-bit floats, and the target is not
            TensorRT.
    """
    for site in iter_quantizers(net):
        if site.quantizer.spec.quantizer in FP8 and form != TENSORRT:
            raise UsageError(
                f"format={form}: {site.name} has 8-bit floats; must be format={TENSORRT} "
                "or format=packed"
            )
        if site.quantizer.in_blocks:
            blocks = f"{site.name} has blocks of {site.quantizer.spec.quantizer}"
            raise UsageError(
                f"format={form}: {blocks}, which this format does not support; "
                "must be format=packed"
            )
    stored = {}
    for name, module in net.named_modules():
        if isinstance(module, FrozenWeight):
            stored[name] = store_weight(module, min_width, cpu)
    return stored


def store_weight(weight: FrozenWeight, min_width: int = 4, cpu: str = "fast") -> StoredWeight:
    """Store a weight exactly, in the smallest type that the runtime can read.

    The values of grids with half steps (StatsQ, SEQ, DoReFa) are (k + 1/2) steps. Products use the
    odd numbers 2k + 1 instead. If 2k + 1 fits the type (2 or 3 bits in INT4, up to 7 in INT8),
    it is stored. If it does not fit (4 bits in INT4, 2 bits in INT2), k is stored, and 2k + 1 is
    computed when the file is opened. With 8 bits, not even a product could use 2k + 1, so products
    use k and half a step is added. Docs: docs/deployment.md.

    Args:
        weight: the frozen weight.
        min_width: minimum width of the stored type: 2; 4 for files that OpenVINO reads; 8 for
            TensorRT and ExecuTorch.
        cpu: `any` stores a weight with codes beyond `MAX_INT8_CODE` as uint8; `fast` stores all
            weights as int8.
    """
    if isinstance(weight, FrozenFp8):
        return StoredWeight(
            frozen=weight,
            width=8,
            codes=weight.stored.view(torch.float8_e4m3fn),
            is_doubled=False,
            scale=weight.scale,
            zero_point=None,
            constant=None,
        )
    bits = weight.spec.bits
    width = min(width for width in OPSETS if width >= max(bits, min_width))
    # Move unsigned codes to the range of signed codes.
    middle = 0 if weight.stored.dtype == torch.int8 else 2 ** (bits - 1)
    codes = weight.stored.to(torch.int16) - middle
    shift = weight.shift + middle
    scale = weight.scale
    zero_point = None
    constant = weight.after
    is_doubled = False
    is_integer = bool((shift % 1 == 0).all())
    if is_integer:
        if bool(shift.any()):
            zero_point = (-shift).to(torch.int8)
    elif bits < 8 and bool((shift == 0.5).all()):
        scale = scale / 2
        is_doubled = bits == width  # there is no bit left for 2 * code + 1
        if not is_doubled:
            codes = 2 * codes + 1
    else:
        offset = scale * shift
        constant = offset if constant is None else constant + offset

    dtype = torch.int8
    can_saturate = width == 8 and bool((codes.abs() > MAX_INT8_CODE).any())
    if cpu == "any" and can_saturate:
        dtype = torch.uint8
        codes = codes + 128
        zero = torch.zeros(1) if zero_point is None else zero_point.float()
        zero_point = (128 + zero).to(torch.uint8)
    return StoredWeight(
        frozen=weight,
        width=width,
        codes=codes.to(dtype),
        is_doubled=is_doubled,
        scale=scale,
        zero_point=zero_point,
        constant=constant,
    )
