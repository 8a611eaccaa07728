"""Quantizers of a frozen model: stored codes and fixed grids, which cannot be trained."""

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

# Buffers with the offsets of activations, which are added before and after the rounding.
OFFSETS = ("before", "after")


class Frozen(Quantizer):
    """A quantizer that cannot be trained.

    Attributes:
        name: path of the quantizer in the model.
        in_graph: function that is set only while a graph is exported; it maps the quantizer's input
            (None for a weight) to the quantizer's result in this graph.
    """

    in_graph: Callable[[Any], Any] | None = None

    def __init__(self, spec: QuantSpec, axis: int | None, name: str) -> None:
        super().__init__(dataclasses.replace(spec, offsets="none"))
        self.axis = axis
        self.name = name


class FrozenWeight(Frozen):
    """A weight with the value (codes + shift) * scale + after.

    Attributes:
        stored: codes, int8 or uint8, in the shape of the weight.
        scale: step sizes, (n,): one per row, or one for all rows.
        shift: (n,), in units of codes, multiples of 1/2: 1/2 for StatsQ, SEQ and DoReFa, minus the
            zero point for affine grids, 0 for other grids.
        after: (n,), number added to each row by bias correction or an offset of the quantizer; None
            = 0.
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
        """The dequantized weight. `x` is not used."""
        return self.grid().dequantize(self.stored)

    def stored_weight(self) -> Tensor:
        """The dequantized weight; while a graph is written, the graph's operand."""
        return self() if self.in_graph is None else self.in_graph(None)

    def codes(self, x: Tensor | None = None) -> Tensor:
        """The stored codes."""
        return self.stored

    def grid(self, x: Tensor | None = None) -> Grid:
        """The grid of the stored codes."""
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
        stored: codes (E2M1 or E4M3 floats as bit patterns), uint8, in the shape of the weight.
        scale: scales of the blocks (E4M3 or E8M0 floats as bytes), uint8, (..., blocks): the
            dimension that is split into blocks is last.
        per_tensor_scale: factor of E4M3 scales, a float32 scalar; None for E8M0 scales.
        like: empty tensor that records the dtype of the model.
        empty_grid: the grid without its scales.
    """

    in_blocks = True
    per_tensor_scale: Tensor | None
    like: Tensor

    def __init__(self, quantizer: BlockFloat, name: str, weight: Tensor) -> None:
        codes, factors, tensor_scale = block_float_codes(
            weight.movedim(quantizer.dim, -1), quantizer.form
        )
        # Blocks of MX formats have powers of two as scales; NVFP4 has E4M3 numbers, and a scale of
        # the whole tensor.
        scale_dtype = torch.float8_e8m0fnu if tensor_scale is None else torch.float8_e4m3fn
        scale = factors.to(scale_dtype).view(torch.uint8)
        stored = codes.movedim(-1, quantizer.dim).contiguous()
        super().__init__(quantizer.spec, quantizer.axis, name, (stored, scale, None, None))
        self.scale_dtype = scale_dtype
        self.register_buffer("per_tensor_scale", tensor_scale)
        self.register_buffer("like", weight.new_empty(0), persistent=False)
        self.empty_grid = quantizer.grid()

    def stored_weight(self) -> Tensor:
        """The dequantized weight, in the dtype of the model."""
        return self().to(self.like.dtype)

    def grid(self, x: Tensor | None = None) -> FloatGrid:
        """The grid to which the removed float weight was rounded."""
        factors = self.scale.view(self.scale_dtype).float().movedim(-1, self.empty_grid.dim)
        return dataclasses.replace(
            self.empty_grid, factors=factors, tensor_scale=self.per_tensor_scale
        )

    def pack(self) -> dict[str, Tensor]:
        """The weight as the tensors that torchao's `MXTensor` and `NVFP4Tensor` consist of.

        Returns:
            A dict with `qdata` (uint8 with two E2M1 codes per byte, or float8), `scale` (float8),
            and `per_tensor_scale` if there is one. The dimension of blocks is last.
        """
        codes = self.stored.movedim(self.empty_grid.dim, -1)
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
        stored: codes (E4M3 floats as bit patterns), uint8, in the shape of the weight.
        scale: (n,), one scale per row.
    """

    def stored_weight(self) -> Tensor:
        """The weight, in the dtype of the model; while a graph is written, the graph's operand."""
        return self().to(self.scale.dtype) if self.in_graph is None else self.in_graph(None)

    def grid(self, x: Tensor | None = None) -> Fp8Grid:
        """The grid to which the removed float weight was rounded."""
        return Fp8Grid(axis=self.axis, factors=self.scale)


class FrozenActivation(Frozen):
    """Rounds an activation to (clamp(round((x + a) / s + z), qmin, qmax) - z) * s + c.

    Attributes:
        scale: s, (n,), in the unit of the input.
        zero_point: z, (n,), multiples of 1/2; None = 0.
        before: a, in the shape of the trailing dimensions; None = 0.
        after: c, in the shape of the trailing dimensions; None = 0.
        bounds: lowest and highest code, int16, (2,). Files store them because calibration decides
            whether the codes of an image are signed.
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
        self._register_copy("scale", grid.step)
        self._register_copy("zero_point", _zero_point(grid))
        self._register_copy("before", grid.before)
        self._register_copy("after", grid.after)

    def _register_copy(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, None if value is None else value.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x` in float32 and restore its dtype, or call `in_graph` if set."""
        if self.in_graph is not None:
            return self.in_graph(x)
        return self.grid().dequantize(self._codes_as_float(x)).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [qmin, qmax]; the zero point is already added."""
        return self._codes_as_float(x).to(code_dtype(self.qmin, self.qmax))

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """The grid that the buffers define."""
        return UniformGrid(
            qmin=self.qmin,
            qmax=self.qmax,
            step=self.scale,
            zero_point=0.0 if self.zero_point is None else self.zero_point,
            axis=self.axis,
            before=self.before,
            after=self.after,
        )

    def _codes_as_float(self, x: Tensor) -> Tensor:
        check_fit(x, self.scale, self.axis, self.before)
        return self.grid().codes(x)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load the buffers, and update `qmin` and `qmax` from `bounds`."""
        super()._load_from_state_dict(*args)
        qmin, qmax = self.bounds
        self.qmin = int(qmin)
        self.qmax = int(qmax)


def _zero_point(grid: UniformGrid) -> Tensor | None:
    """The zero point of a grid as a tensor (n,), or None if the quantizer fixes it at 0."""
    if isinstance(grid.zero_point, Tensor):
        return grid.zero_point
    return torch.full_like(grid.step, grid.zero_point) if grid.zero_point else None


class FrozenNonuniform(Frozen):
    """Wraps a quantizer with unevenly spaced values, such as powers of two."""

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
    """Rounds an activation to E4M3 floats with one scale."""

    # Export reads these attributes of every frozen activation. None = no offset, no Clip node.
    before = None
    onnx_bounds = None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`, or call `in_graph` if set."""
        return super().forward(x) if self.in_graph is None else self.in_graph(x)


def is_frozen(net: nn.Module) -> bool:
    """True if a model contains a frozen quantizer."""
    return any(isinstance(module, Frozen) for module in net.modules())
