"""Quantizers of a net that learns no more: codes of weights, fixed grids of activations. The float masters are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.functional.ste import code_dtype, view_along
from qat.model.frozen.coded import QuantizedTensor
from qat.model.frozen.products import LARGEST, UnsupportedIntegerOp
from qat.quantizers import Grid, Quantizer, UniformGrid
from qat.spec import OUTPUT_ROLES, QuantSpec

MODES = ("float", "integer")
# What leaves these goes into sums and norms, not into products.
_STAYS_A_NUMBER = frozenset(OUTPUT_ROLES) - {"qkv"}
# Of activations: in front of the rounding, and behind it.
OFFSETS = ("before", "after")


class Frozen(Quantizer):
    """A quantizer without parameters.

    Attributes:
        mode: `float` gives numbers on the grid, `integer` what products of codes take (`QuantizedTensor`).
        name: of its site.
        form: gives what stands for its result while the net is written as a graph; takes what `forward` takes. None = as here.
    """

    form: Callable[[Any], Any] | None = None

    def __init__(self, spec: QuantSpec, axis: int | None, name: str) -> None:
        super().__init__(dataclasses.replace(spec, offsets="none"))
        self.axis, self.name, self.mode = axis, name, "float"

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Nothing: everything is there."""

    @property
    def is_factor(self) -> bool:
        """True if products take what it gives."""
        return self.spec.role not in _STAYS_A_NUMBER

    @property
    def gives_codes(self) -> bool:
        """True if the next forward pass gives `QuantizedTensor`."""
        return self.mode == "integer" and self.is_factor


class FrozenWeight(Frozen):
    """(codes + shift) * scale + after.

    Attributes:
        stored: codes of the weight, int8 or uint8, its shape.
        scale: step between two codes, (n,), of each row or one for all.
        shift: half a step for StatsQ, minus the zero point for affine grids; (n,) in codes, whole or half numbers.
        after: what is added behind a row, by bias correction or by the quantizer, (n,), or None.
    """

    stored: Tensor
    scale: Tensor
    shift: Tensor
    after: Tensor | None

    def __init__(self, spec: QuantSpec, axis: int | None, name: str, parts: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        super().__init__(spec, axis, name)
        for key, value in zip(("stored", "scale", "shift", "after"), parts, strict=True):
            self.register_buffer(key, value)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The weight, float32, whatever `x` is."""
        return self.grid().dequantize(self.stored)

    def held(self) -> Tensor:
        """The weight, as codes where the mode says so."""
        if self.form is not None:
            return self.form(None)
        return _quantized(self.grid(), self.stored, self.name) if self.gives_codes else self()  # type: ignore[return-value]

    def codes(self, x: Tensor | None = None) -> Tensor:
        """`stored`."""
        return self.stored

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """Of the float weight that is gone."""
        lowest = -(2 ** (self.spec.bits - 1)) if self.stored.dtype == torch.int8 else 0
        highest = lowest + 2**self.spec.bits - 1
        after = None if self.after is None else view_along(self.after, self.stored.ndim, self.axis)
        return UniformGrid(qmin=lowest, qmax=highest, step=self.scale, zero_point=-self.shift, axis=self.axis, after=after)

    def extra_repr(self) -> str:
        """What is stored."""
        return f"{tuple(self.stored.shape)} codes of {self.spec.bits} bits, {self.scale.numel()} scales, axis={self.axis}"


class FrozenActivation(Frozen):
    """(clamp(round((x + a) / s + z), qmin, qmax) - z) * s + c.

    Attributes:
        scale: s, (n,), in the unit of the input.
        zero_point: z, (n,), whole or half numbers, or None = 0.
        before: a, over trailing dimensions, or None.
        after: c, over trailing dimensions, or None.
        bounds: lowest and highest code, int16, (2,): whether those of an image have a sign was found from data.
        qmin, qmax: the same as numbers.
    """

    bounds: Tensor

    scale: Tensor
    zero_point: Tensor | None
    before: Tensor | None
    after: Tensor | None

    def __init__(self, spec: QuantSpec, name: str, grid: UniformGrid) -> None:
        super().__init__(spec, grid.axis, name)
        self.qmin, self.qmax = grid.qmin, grid.qmax
        self.register_buffer("bounds", torch.tensor([grid.qmin, grid.qmax], dtype=torch.int16))
        zero = grid.zero_point
        if not isinstance(zero, Tensor):
            zero = torch.full_like(grid.step, zero) if zero else None  # type: ignore[assignment]
        for key, value in (("scale", grid.step), ("zero_point", zero), ("before", grid.before), ("after", grid.after)):
            self.register_buffer(key, None if value is None else value.detach().float().clone())  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Numbers on the grid, float32 inside and the dtype of `x` outside; or `QuantizedTensor`."""
        if self.form is not None:
            return self.form(x)
        if self.gives_codes:
            return _quantized(self.grid(), self._rounded(x), self.name)  # type: ignore[return-value]
        return self.grid().dequantize(self._rounded(x)).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [qmin, qmax], zero point included."""
        return self._rounded(x).to(code_dtype(self.qmin, self.qmax))

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """That of the buffers."""
        zero = 0.0 if self.zero_point is None else self.zero_point
        bounds = {"qmin": self.qmin, "qmax": self.qmax}
        return UniformGrid(**bounds, step=self.scale, zero_point=zero, axis=self.axis, before=self.before, after=self.after)

    def _rounded(self, x: Tensor) -> Tensor:
        """Codes as float32."""
        return self.grid().to_code_coordinates(x).round().clamp(self.qmin, self.qmax)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.qmin, self.qmax = (int(n) for n in self.bounds)


class FrozenNonuniform(Frozen):
    """Values that are not evenly spaced, as powers of two; as codes, whole multiples of the unit of their grid."""

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__(quantizer.spec, quantizer.axis, name)
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """What the quantizer gives, or `QuantizedTensor`."""
        y: Tensor = self.quantizer(x)
        if not self.gives_codes:
            return y
        grid = self.grid()
        unit = torch.as_tensor(grid.unit, device=x.device)
        bound = int(max(float(end.abs().max()) for end in grid.ends()) / float(grid.unit))
        if bound > LARGEST:
            raise UnsupportedIntegerOp(
                f"{self.name}: its values are no integers of 32 bits: they go up to {bound} times the smallest; must be fewer bits"
            )
        return QuantizedTensor.of(y.float() / unit, unit, None, bound, self.name)  # type: ignore[return-value]

    def codes(self, x: Tensor) -> Tensor:
        """Those of the quantizer."""
        return self.quantizer.codes(x)

    def grid(self, x: Tensor | None = None) -> Grid:
        """That of the quantizer."""
        found = self.quantizer.grid(x)
        assert found is not None  # noqa: S101  (narrows a type)
        return found


def _quantized(grid: UniformGrid, codes: Tensor, name: str) -> QuantizedTensor:
    """On a grid through zero: codes without the zero point, of half steps the odd numbers 2k+1 in units of half a step."""
    _, zero = grid.along(codes.ndim)
    factor = 2 if grid.is_half_step else 1
    lowest, highest = (float(end) for end in torch.as_tensor(zero).aminmax())
    if (torch.as_tensor(zero) * 2 % 1 != 0).any():
        raise UnsupportedIntegerOp(f"{name}: its zero point is no whole or half number of codes, so its values are no integers")
    bound = int(factor * max(abs(grid.qmin - highest), abs(grid.qmax - lowest)))
    unit = view_along(grid.unit, codes.ndim, grid.axis)
    return QuantizedTensor.of((codes - zero) * factor, unit, grid.after, bound, name)


def set_mode(net: nn.Module, mode: str) -> nn.Module:
    """Compute quantized products of a frozen net on numbers (`float`) or on codes (`integer`)."""
    for module in net.modules():
        if isinstance(module, Frozen):
            module.mode = mode
    return net
