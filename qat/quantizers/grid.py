"""Codes of a quantizer and the values that they stand for; see `Quantizer.grid`.

Packing, export, reports and callbacks read grids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.functional.confidence import in_band
from qat.functional.ste import TINY, nearest_codes, view_along


@dataclass(frozen=True, kw_only=True)
class Grid(ABC):
    """Codes of a quantizer and the values that they stand for, without gradient.

    Attributes:
        qmin: lowest code.
        qmax: highest code.
        before: offset before the quantizer, which broadcasts against the tensor; None = 0.
        after: offset after the quantizer, which also broadcasts; None = 0.
    """

    qmin: int
    qmax: int
    before: Tensor | None = None
    after: Tensor | None = None

    @abstractmethod
    def to_code_coordinates(self, x: Tensor) -> Tensor:
        """Coordinates of `x` on the axis of codes, float32, not clamped.

        `codes` rounds and clamps them.
        """

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x`, numbered as in `to_sorted_index`: whole float32 numbers in [qmin, qmax]."""
        return nearest_codes(self.to_code_coordinates(x), self.qmin, self.qmax)

    @abstractmethod
    def dequantize(self, codes: Tensor) -> Tensor:
        """The values that codes of `Quantizer.codes` stand for, float32, in the shape of the codes.

        In `FloatGrid`, these codes are not the numbers that `Grid.codes` returns.
        """

    def to_sorted_index(self, codes: Tensor) -> Tensor:
        """Codes, numbered from qmin to qmax so that consecutive codes have neighbouring values."""
        return codes

    @property
    @abstractmethod
    def unit(self) -> Tensor | float:
        """For each scale, a number of which all values (without `after`) are integer multiples.

        The result broadcasts against the scales.
        """

    @abstractmethod
    def ends(self, ndim: int | None = None) -> tuple[Tensor, Tensor]:
        """Lowest and highest value, without the offset `after`.

        Both broadcast against tensors of `ndim` dimensions; if `ndim` is None, they are (n,) or
        scalars.
        """

    def near_threshold(self, x: Tensor, boundary: float) -> Tensor:
        """True where `x` is within `boundary` codes of a threshold between neighbouring codes.

        Only thresholds between the lowest and the highest code of `x` count.

        Returns:
            bool, the shape of `x`.

        Raises:
            UsageError: `boundary` is not between 0 and 0.5.
        """
        return in_band(self.to_code_coordinates(x), self.qmin, self.qmax, boundary)

    def shift(self, x: Tensor) -> Tensor:
        """`x` plus the offset `before`, in float32 without gradient."""
        x = x.detach().float()
        if self.before is None:
            return x
        return x + self.before


@dataclass(frozen=True, kw_only=True)
class UniformGrid(Grid):
    """Evenly spaced values.

    The code of x is k = clamp(round((x + a) / s + z), qmin, qmax). Its value is (k - z) * s + c.
    The offsets are a = `before` and c = `after`.

    Attributes:
        step: s, float32 in the unit of the tensor: (n,), one for each slice along `axis`, or (1,).
        zero_point: z, in codes: (n,), or a number if the quantizer fixes it (0, or -1/2 for half
            steps).
        axis: dimension along which step sizes differ; None = one step size for the tensor.
    """

    step: Tensor
    zero_point: Tensor | float = 0.0
    axis: int | None = None

    def along(self, ndim: int) -> tuple[Tensor, Tensor | float]:
        """Step size and zero point, shaped to broadcast against tensors of `ndim` dimensions."""
        step = view_along(self.step, ndim, self.axis)
        if isinstance(self.zero_point, Tensor):
            return step, view_along(self.zero_point, ndim, self.axis)
        return step, self.zero_point

    @property
    def _has_zero_point(self) -> bool:
        """True unless the zero point is fixed at 0."""
        return isinstance(self.zero_point, Tensor) or self.zero_point != 0

    @property
    def is_half_step(self) -> bool:
        """True if zero is half-way between two values, as in StatsQ's grid."""
        return bool(torch.as_tensor(self.zero_point % 1 != 0).any())

    @property
    def unit(self) -> Tensor:
        """The step size, or half of it if zero is half-way between two values."""
        if self.is_half_step:
            return self.step / 2
        return self.step

    def to_code_coordinates(self, x: Tensor) -> Tensor:
        """(x + a) / s + z.

        For a row of zeros, where StatsQ's step size is zero, the coordinate is z.
        """
        step, zero = self.along(x.ndim)
        u = self.shift(x) / step.clamp(min=TINY)
        if self._has_zero_point:
            return u + zero
        return u

    def dequantize(self, codes: Tensor) -> Tensor:
        """(code - z) * s + c."""
        step, zero = self.along(codes.ndim)
        if self._has_zero_point:
            codes = codes - zero
        y = codes * step
        if self.after is None:
            return y
        return y + self.after

    def ends(self, ndim: int | None = None) -> tuple[Tensor, Tensor]:
        """(qmin - z) * s and (qmax - z) * s."""
        step = self.step
        zero = self.zero_point
        if ndim is not None:
            step, zero = self.along(ndim)
        return (self.qmin - zero) * step, (self.qmax - zero) * step
