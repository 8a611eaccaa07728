"""Quantizers of a net that learns no more: codes of weights, fixed grids of activations. The float masters are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.functional.ste import code_dtype, view_along
from qat.quantizers import Grid, Quantizer, UniformGrid
from qat.spec import QuantSpec

# Of activations: added before the rounding, and after it.
OFFSETS = ("before", "after")


class Frozen(Quantizer):
    """A quantizer without parameters.

    Attributes:
        name: of its site.
        in_graph: takes what `forward` takes and gives what products of an exported graph take; None except while a graph is written.
    """

    in_graph: Callable[[Any], Any] | None = None

    def __init__(self, spec: QuantSpec, axis: int | None, name: str) -> None:
        super().__init__(dataclasses.replace(spec, offsets="none"))
        self.axis, self.name = axis, name

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Nothing: everything is there."""


class FrozenWeight(Frozen):
    """(codes + shift) * scale + after.

    Attributes:
        stored: codes of the weight, int8 or uint8, its shape.
        scale: step size, (n,), of each row or one for all.
        shift: 1/2 for StatsQ, minus the zero point for affine grids; (n,) in codes, whole or half numbers.
        after: what is added to a row, by bias correction or by the quantizer, (n,), or None.
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
        """The weight."""
        return self() if self.in_graph is None else self.in_graph(None)

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
        bounds: lowest and highest code, int16, (2,): calibration finds whether those of an image have a sign.
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
        """Numbers on the grid, float32 inside and the dtype of `x` outside."""
        if self.in_graph is not None:
            return self.in_graph(x)
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
    """Values that are not evenly spaced, as powers of two: the quantizer itself."""

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__(quantizer.spec, quantizer.axis, name)
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """What the quantizer gives."""
        y: Tensor = self.quantizer(x)
        return y

    def codes(self, x: Tensor) -> Tensor:
        """Those of the quantizer."""
        return self.quantizer.codes(x)

    def grid(self, x: Tensor | None = None) -> Grid | None:
        """That of the quantizer."""
        return self.quantizer.grid(x)
