"""Where the values of a quantizer lie: all that packing, export, reports and callbacks know of it. See `Quantizer.grid`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.functional.confidence import in_band
from qat.functional.ste import TINY, view_along


@dataclass(frozen=True, kw_only=True)
class Grid(ABC):
    """Codes and the values that they stand for, without gradient.

    Attributes:
        qmin: lowest code.
        qmax: highest code.
        before: offset before the quantizer, broadcasts against the tensor; None = 0.
        after: offset after it; None = 0.
    """

    qmin: int
    qmax: int
    before: Tensor | None = None
    after: Tensor | None = None

    @abstractmethod
    def to_code_coordinates(self, x: Tensor) -> Tensor:
        """Place of `x` on the axis of codes, float32, not clamped: the code is its rounding (half to even), clamped."""

    @abstractmethod
    def dequantize(self, codes: Tensor) -> Tensor:
        """Values that codes stand for, float32; the shape of the tensor."""

    def in_order(self, codes: Tensor) -> Tensor:
        """Codes as numbers from qmin to qmax that grow with the value."""
        return codes

    @property
    @abstractmethod
    def unit(self) -> Tensor | float:
        """What all values but the offset after it are whole multiples of; broadcasts against scales (n,)."""

    @abstractmethod
    def ends(self, ndim: int | None = None) -> tuple[Tensor, Tensor]:
        """Lowest and highest value, without the offset after it; broadcast against `ndim` dimensions, for None (n,) or a scalar."""

    def near_threshold(self, x: Tensor, boundary: float) -> Tensor:
        """True where `x` is within `boundary` codes of a threshold between two codes that occur in it; bool, its shape."""
        return in_band(self.to_code_coordinates(x), self.qmin, self.qmax, boundary)

    def shift(self, x: Tensor) -> Tensor:
        """What is rounded: x + a in float32."""
        x = x.detach().float()
        return x if self.before is None else x + self.before


@dataclass(frozen=True, kw_only=True)
class UniformGrid(Grid):
    """Evenly spaced values: of x + a the code is clamp(round((x + a) / s + z), qmin, qmax), and its value (code - z) * s + c.

    Attributes:
        step: s, (n,) float32 in the unit of the tensor: one for each slice along `axis`, (1,) without an axis.
        zero_point: z, in codes: a number where the quantizer fixes it (0, or -1/2 for half steps), (n,) where it is found from data.
        axis: dimension that keeps steps of its own, None = one for the tensor.
    """

    step: Tensor
    zero_point: Tensor | float = 0.0
    axis: int | None = None

    def along(self, ndim: int) -> tuple[Tensor, Tensor | float]:
        """Step and zero point that broadcast against `ndim` dimensions."""
        zero = self.zero_point
        return view_along(self.step, ndim, self.axis), view_along(
            zero, ndim, self.axis
        ) if isinstance(zero, Tensor) else zero

    @property
    def is_half_step(self) -> bool:
        """True if zero lies half-way between two values, as in StatsQ's grid."""
        return bool(torch.as_tensor(self.zero_point % 1 != 0).any())

    @property
    def unit(self) -> Tensor:
        """The step, or half of it."""
        return self.step / 2 if self.is_half_step else self.step

    def to_code_coordinates(self, x: Tensor) -> Tensor:
        """(x + a) / s + z. A row of zeros has a step of zero with StatsQ: its coordinates are z."""
        step, zero = self.along(x.ndim)
        u = self.shift(x) / step.clamp(min=TINY)
        return u if isinstance(zero, float) and not zero else u + zero

    def dequantize(self, codes: Tensor) -> Tensor:
        """(code - z) * s + c."""
        step, zero = self.along(codes.ndim)
        y = (codes if isinstance(zero, float) and not zero else codes - zero) * step
        return y if self.after is None else y + self.after

    def ends(self, ndim: int | None = None) -> tuple[Tensor, Tensor]:
        """(qmin - z) * s and (qmax - z) * s."""
        step, zero = (self.step, self.zero_point) if ndim is None else self.along(ndim)
        return (self.qmin - zero) * step, (self.qmax - zero) * step
