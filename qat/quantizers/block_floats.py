"""Floats in blocks with one scale each: `mxfp` of 4 or 8 bits, and `nvfp4`.

There are no parameters: each forward computes the scales of the blocks from the tensor.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qat import kernels
from qat.functional.block_floats import (
    BLOCK_FORMATS,
    BlockFormat,
    block_float_codes,
    float_values,
    sorted_index,
)
from qat.quantizers.grid import Grid
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class FloatGrid(Grid):
    """Values of a float format times the scale of their block.

    A code consists of sign, exponent and mantissa bits. `qmin` and `qmax` are indices among the
    sorted values, not codes.

    Attributes:
        form: the format.
        dim: dimension that is split into blocks.
        factors: (..., blocks, ...), scales of the blocks, divided by `tensor_scale` if there is
            one; None = unknown without a tensor.
        tensor_scale: scale of the whole tensor in a two-level format; None for one level, or
            without `factors`.
    """

    form: BlockFormat
    dim: int
    factors: Tensor | None = None
    tensor_scale: Tensor | None = None

    def to_sorted_index(self, codes: Tensor) -> Tensor:
        """Index of each code among the sorted values; zero has index 0."""
        return sorted_index(float_values(codes, self.form), self.form)

    @property
    def scales(self) -> Tensor:
        """Scales of blocks, float32, shaped like `factors`.

        Raises:
            ValueError: the grid was built without a tensor.
        """
        if self.factors is None:
            raise ValueError(
                "FloatGrid: the scales depend on the tensor; must be built by quantizer.grid(x)"
            )
        if self.tensor_scale is None:
            return self.factors
        return self.factors * self.tensor_scale

    def along(self, x: Tensor) -> Tensor:
        """Scales, shaped to broadcast against a tensor."""
        each_value = self.scales.repeat_interleave(self.form.block_size, self.dim)
        return each_value.narrow(self.dim, 0, x.shape[self.dim])

    @property
    def unit(self) -> Tensor:
        """The smallest value above zero in the grid of each block; 0 if its scale is 0."""
        return self.scales * 2.0 ** (self.form.min_exponent - self.form.mantissa)

    def ends(self, ndim: int | None = None) -> tuple[Tensor, Tensor]:
        """Lowest and highest value, in the block with the largest scale; scalars."""
        highest = self.form.max_value * self.scales.amax()
        return -highest, highest

    def to_code_coordinates(self, x: Tensor) -> Tensor:
        """Index of `shift(x)` among the sorted values, or between two; 0 for a scale of 0."""
        scales = self.along(x)
        divisors = torch.where(scales == 0, torch.inf, scales)
        return sorted_index(self.shift(x) / divisors, self.form)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of the codes times the scale of their block, plus `after`."""
        y = float_values(codes, self.form) * self.along(codes)
        if self.after is None:
            return y
        return y + self.after


@register("mxfp")
@register("nvfp4")
class BlockFloat(Quantizer):
    """Floats in blocks along `spec.axis`, the dimension over which a matrix product sums.

    With an axis of None, blocks are along the channels of a convolution's input (B, C, H, W).
    """

    in_blocks = True

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.form = BLOCK_FORMATS[spec.quantizer, spec.bits]
        self.dim = 1 if spec.axis is None else spec.axis

    def forward(self, x: Tensor) -> Tensor:
        """`qat.functional.block_float`."""
        return kernels.block_floats(x.movedim(self.dim, -1), self.form).movedim(-1, self.dim)

    def codes(self, x: Tensor) -> Tensor:
        """Bit patterns of E2M1 (0 to 15) or E4M3, uint8."""
        codes, _, _ = block_float_codes(x.detach().movedim(self.dim, -1), self.form)
        return codes.movedim(-1, self.dim)

    def grid(self, x: Tensor | None = None) -> FloatGrid:
        """The grid of `x`; without `x`, only the number format is known."""
        # The last code of E4M3 is NaN.
        qmax = {4: 7, 8: 126}[self.form.bits]
        grid = FloatGrid(qmin=-qmax, qmax=qmax, form=self.form, dim=self.dim)
        if x is None:
            return grid
        _, factors, tensor_scale = block_float_codes(x.detach().movedim(self.dim, -1), self.form)
        return dataclasses.replace(
            grid, factors=factors.movedim(-1, self.dim), tensor_scale=tensor_scale
        )

    def scale_bytes(self, shape: torch.Size) -> int:
        """Bytes of the scales of a tensor: 1 per block, and 4 more in a two-level format."""
        row_length = shape[self.dim]
        num_rows = shape.numel() // row_length
        blocks_per_row = math.ceil(row_length / self.form.block_size)
        tensor_bytes = 4 if self.form.two_level else 0
        return num_rows * blocks_per_row + tensor_bytes
