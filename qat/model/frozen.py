"""Quantizers of a frozen model: integer codes and fixed grids, without parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.functional.block_floats import block_float_codes
from qat.functional.packing import pack_pairs
from qat.functional.ste import check_fit, code_dtype, view_along
from qat.quantizers import BlockFloat, FloatGrid, Fp8Grid, Grid, Quantizer, UniformGrid
from qat.spec import QuantSpec

# Offsets of activations: added before the rounding, and after it.
OFFSETS = ("before", "after")


class Frozen(Quantizer):
    """A quantizer without parameters.

    Attributes:
        name: path of the quantizer in the model.
        in_graph: while a graph is written, maps the input of `forward` to the operand of products
            in the exported graph; None otherwise.
    """

    in_graph: Callable[[Any], Any] | None = None

    def __init__(self, spec: QuantSpec, axis: int | None, name: str) -> None:
        super().__init__(dataclasses.replace(spec, offsets="none"))
        self.axis = axis
        self.name = name


class FrozenWeight(Frozen):
    """A weight, (codes + shift) * scale + after.

    Attributes:
        stored: codes, int8 or uint8, in the shape of the weight.
        scale: step size, (n,), one per row or one for all rows.
        shift: (n,) in codes, multiples of 1/2: 1/2 for StatsQ, minus the zero point for affine
            grids.
        after: (n,), added to each row by bias correction or by the quantizer; or None.
    """

    stored: Tensor
    scale: Tensor
    shift: Tensor
    after: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        axis: int | None,
        name: str,
        parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    ) -> None:
        super().__init__(spec, axis, name)
        for key, value in zip(("stored", "scale", "shift", "after"), parts, strict=True):
            self.register_buffer(key, value)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The float32 weight; `x` is not used."""
        return self.grid().dequantize(self.stored)

    def stored_weight(self) -> Tensor:
        """The dequantized weight."""
        return self() if self.in_graph is None else self.in_graph(None)

    def codes(self, x: Tensor | None = None) -> Tensor:
        """The stored codes."""
        return self.stored

    def grid(self, x: Tensor | None = None) -> Grid:
        """The grid of the float weight that was removed."""
        lowest = -(2 ** (self.spec.bits - 1)) if self.stored.dtype == torch.int8 else 0
        highest = lowest + 2**self.spec.bits - 1
        after = None if self.after is None else view_along(self.after, self.stored.ndim, self.axis)
        return UniformGrid(
            qmin=lowest,
            qmax=highest,
            step=self.scale,
            zero_point=-self.shift,
            axis=self.axis,
            after=after,
        )


class FrozenBlocks(FrozenWeight):
    """A weight stored as blocks of floats.

    Attributes:
        stored: codes, bits of E2M1 or E4M3, uint8, in the shape of the weight.
        scale: bytes of the scales of blocks, E4M3 or E8M0, uint8; the last dimension counts blocks.
        per_tensor_scale: factor of E4M3 scales, a float32 scalar; None if scales are powers of two.
    """

    in_blocks = True
    per_tensor_scale: Tensor | None
    like: Tensor

    def __init__(self, quantizer: BlockFloat, name: str, weight: Tensor) -> None:
        codes, factors, tensor_scale = block_float_codes(
            weight.movedim(quantizer.dim, -1), quantizer.form
        )
        is_power_of_two = tensor_scale is None
        self.scale_dtype = torch.float8_e8m0fnu if is_power_of_two else torch.float8_e4m3fn
        scale = factors.to(self.scale_dtype).view(torch.uint8)
        stored = codes.movedim(-1, quantizer.dim).contiguous()
        super().__init__(quantizer.spec, quantizer.axis, name, (stored, scale, None, None))
        self.register_buffer("per_tensor_scale", tensor_scale)
        # An empty tensor with the dtype of the model.
        self.register_buffer("like", weight.new_empty(0), persistent=False)
        self.empty = quantizer.grid()

    def stored_weight(self) -> Tensor:
        """The dequantized weight, in the dtype of the model."""
        return self().to(self.like.dtype)

    def grid(self, x: Tensor | None = None) -> FloatGrid:
        """The grid of the float weight that was removed."""
        factors = self.scale.view(self.scale_dtype).float().movedim(-1, self.empty.dim)
        return dataclasses.replace(self.empty, factors=factors, tensor_scale=self.per_tensor_scale)

    def packed(self) -> dict[str, Tensor]:
        """The tensors of torchao's `MXTensor` and `NVFP4Tensor`.

        Returns:
            `qdata` (two E2M1 codes or one E4M3 code per byte), `scale`, and `per_tensor_scale` if
            there is one.
        """
        codes = self.stored.movedim(self.empty.dim, -1)
        if self.spec.bits == 4:
            qdata = pack_pairs(codes)
        else:
            qdata = codes.contiguous().view(torch.float8_e4m3fn)
        tensors = {"qdata": qdata, "scale": self.scale.view(self.scale_dtype)}
        if self.per_tensor_scale is not None:
            tensors["per_tensor_scale"] = self.per_tensor_scale
        return tensors


class FrozenFp8(FrozenWeight):
    """A weight of E4M3 floats.

    Attributes:
        stored: codes, bits of E4M3, uint8, in the shape of the weight.
        scale: (n,), a scale for each row.
    """

    def stored_weight(self) -> Tensor:
        """The weight, in the dtype of the model."""
        return self().to(self.scale.dtype) if self.in_graph is None else self.in_graph(None)

    def grid(self, x: Tensor | None = None) -> Fp8Grid:
        """The grid of the float weight that was removed."""
        return Fp8Grid(axis=self.axis, factors=self.scale)


class FrozenActivation(Frozen):
    """An activation, (clamp(round((x + a) / s + z), qmin, qmax) - z) * s + c.

    Attributes:
        scale: s, (n,), in the unit of the input.
        zero_point: z, (n,), multiples of 1/2; None = 0.
        before: a, over trailing dimensions, or None.
        after: c, over trailing dimensions, or None.
        bounds: lowest and highest code, int16, (2,). Calibration decides whether the codes of an
            image are signed, so files store them.
        qmin, qmax: `bounds` as Python numbers.
    """

    bounds: Tensor
    scale: Tensor
    zero_point: Tensor | None
    before: Tensor | None
    after: Tensor | None

    def __init__(self, spec: QuantSpec, name: str, grid: UniformGrid) -> None:
        super().__init__(spec, grid.axis, name)
        self.qmin = grid.qmin
        self.qmax = grid.qmax
        self.register_buffer("bounds", torch.tensor([grid.qmin, grid.qmax], dtype=torch.int16))
        self._register("scale", grid.step)
        self._register("zero_point", _zero_point(grid))
        self._register("before", grid.before)
        self._register("after", grid.after)

    def _register(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, None if value is None else value.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`, computed in float32 and returned in the dtype of `x`."""
        if self.in_graph is not None:
            return self.in_graph(x)
        return self.grid().dequantize(self._rounded(x)).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [qmin, qmax], including the zero point."""
        return self._rounded(x).to(code_dtype(self.qmin, self.qmax))

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """The grid that the buffers describe."""
        return UniformGrid(
            qmin=self.qmin,
            qmax=self.qmax,
            step=self.scale,
            zero_point=0.0 if self.zero_point is None else self.zero_point,
            axis=self.axis,
            before=self.before,
            after=self.after,
        )

    def _rounded(self, x: Tensor) -> Tensor:
        """Codes as float32."""
        check_fit(x, self.scale, self.axis, self.before)
        return self.grid().to_code_coordinates(x).round().clamp(self.qmin, self.qmax)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        qmin, qmax = self.bounds
        self.qmin = int(qmin)
        self.qmax = int(qmax)


def _zero_point(grid: UniformGrid) -> Tensor | None:
    if isinstance(grid.zero_point, Tensor):
        return grid.zero_point
    return torch.full_like(grid.step, grid.zero_point) if grid.zero_point else None


class FrozenNonuniform(Frozen):
    """Wraps a quantizer whose values are not evenly spaced, such as powers of two."""

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__(quantizer.spec, quantizer.axis, name)
        self.quantizer = quantizer
        self.in_blocks = quantizer.in_blocks

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`."""
        y: Tensor = self.quantizer(x)
        return y

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`."""
        return self.quantizer.codes(x)

    def grid(self, x: Tensor | None = None) -> Grid | None:
        """The grid of the wrapped quantizer."""
        return self.quantizer.grid(x)


class FrozenFp8Activation(FrozenNonuniform):
    """An activation of E4M3 floats with one scale."""

    before = None
    onnx_bounds = None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`."""
        return super().forward(x) if self.in_graph is None else self.in_graph(x)


def is_frozen(net: nn.Module) -> bool:
    """True for a model that `freeze` returned."""
    return any(isinstance(module, Frozen) for module in net.modules())
