"""Floats in blocks with scales of their own, read off the tensor in every forward: `mxfp` of 4 or 8 bits, and `nvfp4`. No parameters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from qat import kernels
from qat.functional.block_floats import (
    BLOCK_FORMATS,
    BlockFormat,
    block_float_codes,
    float_place,
    float_values,
)
from qat.quantizers.grid import Grid
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class FloatGrid(Grid):
    """Values of a format times the scale of their block. Codes are bits: sign, exponent, mantissa; -qmax to qmax count the values in order.

    Attributes:
        form: the format.
        dim: dimension along which blocks lie.
        factors: (..., blocks, ...), scales of blocks, or what they are made of t; None = found anew for every tensor.
        tensor_scale: t, or None.
    """

    form: BlockFormat
    dim: int
    factors: Tensor | None = None
    tensor_scale: Tensor | None = None

    def in_order(self, codes: Tensor) -> Tensor:
        """The place of each code among the values, zero at 0."""
        return float_place(float_values(codes, self.form), self.form)

    @property
    def scales(self) -> Tensor:
        """Of blocks, float32.

        Raises:
            ValueError: the grid is that of no tensor.
        """
        if self.factors is None:
            raise ValueError(
                "FloatGrid: its scales are those of a tensor; must be made by quantizer.grid(x)"
            )
        return self.factors if self.tensor_scale is None else self.factors * self.tensor_scale

    def along(self, length: int) -> Tensor:
        """The scale of each value of a tensor with `length` of them along `dim`."""
        return self.scales.repeat_interleave(self.form.block, self.dim).narrow(self.dim, 0, length)

    @property
    def unit(self) -> Tensor:
        """The smallest value above zero, of each block."""
        return self.scales * 2.0 ** (self.form.lowest - self.form.mantissa)

    def ends(self, ndim: int | None = None) -> tuple[Tensor, Tensor]:
        """The largest value with the largest scale, and what is as far below zero; scalars."""
        most = self.form.highest * self.scales.amax()
        return -most, most

    def to_code_coordinates(self, x: Tensor) -> Tensor:
        """Place among the values of the format, zero at 0."""
        scales = self.along(x.shape[self.dim])
        return float_place(self.shift(x) / torch.where(scales == 0, torch.inf, scales), self.form)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The value of a code times its scale."""
        y = float_values(codes, self.form) * self.along(codes.shape[self.dim])
        return y if self.after is None else y + self.after


@register("mxfp")
@register("nvfp4")
class BlockFloat(Quantizer):
    """Blocks along `spec.axis`: the dimension over which a product sums; None = the channels (B, C, H, W) of a convolution's input."""

    in_blocks = True

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.form = BLOCK_FORMATS[spec.quantizer, spec.bits]
        self.dim = 1 if spec.axis is None else spec.axis

    def forward(self, x: Tensor) -> Tensor:
        """`qat.functional.block_float`."""
        return kernels.block_floats(x.movedim(self.dim, -1), self.form).movedim(-1, self.dim)

    def codes(self, x: Tensor) -> Tensor:
        """Bits of E2M1 (0 to 15) or E4M3, uint8."""
        return block_float_codes(x.detach().movedim(self.dim, -1), self.form)[0].movedim(
            -1, self.dim
        )

    def grid(self, x: Tensor | None = None) -> FloatGrid:
        """That of `x`; of None one that knows its format alone."""
        most = {4: 7, 8: 126}[self.form.bits]  # E4M3's last code is NaN
        grid = FloatGrid(qmin=-most, qmax=most, form=self.form, dim=self.dim)
        if x is None:
            return grid
        _, factors, t = block_float_codes(x.detach().movedim(self.dim, -1), self.form)
        return dataclasses.replace(grid, factors=factors.movedim(-1, self.dim), tensor_scale=t)

    def scale_bytes(self, shape: torch.Size) -> int:
        """What the scales of a tensor take: a byte for each block, with two levels a float32 for the tensor."""
        n = shape[self.dim]
        return shape.numel() // n * -(-n // self.form.block) + 4 * self.form.two_level
