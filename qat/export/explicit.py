"""A net for compilers that place integer kernels themselves, as TensorRT: QuantizeLinear and DequantizeLinear around each product.

Rules of TensorRT's explicit quantization (its developer guide, "Working with Quantized Types"): int8, zero points of 0, one scale for an
activation, one for each output of a weight, and nothing between DequantizeLinear and the product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.export.stored_weights import Stored
from qat.export.write import BOUNDS, CODES, FACTOR, STEP, ZERO, dequantize, quantize
from qat.model.frozen import FrozenActivation, FrozenWeight


def check_rules(net: nn.Module, forms: Mapping[str, Stored]) -> None:
    """Raise `UsageError` unless the rules hold for a frozen net and its weights."""
    for name, module in net.named_modules():
        if isinstance(module, FrozenActivation) and (why := _broken_by(module)):
            raise UsageError(f"format.target=tensorrt: {name} has {why}")
    for name, form in forms.items():
        if form.zero_point is not None or form.constant is not None:
            raise UsageError(f"format.target=tensorrt: {name} has codes with a zero point; must be symmetric, as of quant=deploy_w8a8")


def _broken_by(grid: FrozenActivation) -> str | None:
    if grid.scale.numel() > 1:
        return f"{grid.scale.numel()} steps; must be one, as with quant.act_scales=tensor"
    if grid.zero_point is not None and bool(grid.zero_point.any()):
        return "a zero point, or half steps; must be symmetric, as of quant=deploy_w8a8 or with ptq.act_signed=true"
    if grid.after is not None:
        return "an offset behind it; must be a net with quant.offsets=false"
    if grid.qmax > torch.iinfo(torch.int8).max:
        return f"codes up to {grid.qmax}, which int8 has not; must be a net with quant.fits_int8=true, or of ptq=deploy_w8a8"
    return None


class Explicit:
    """Writes quantizers down; what they give are numbers."""

    def prepare(self, net: nn.Module) -> None:
        """Give quantizers of activations their buffers."""
        for module in net.modules():
            if isinstance(module, FrozenActivation):
                module.register_buffer(STEP, module.scale.reshape(()))
                module.register_buffer(ZERO, torch.zeros((), dtype=torch.int8))
                bounds = (module.qmin * float(module.scale), module.qmax * float(module.scale))
                setattr(module, BOUNDS, None if module.qmax - module.qmin == 255 else bounds)

    def activation(self, grid: FrozenActivation, x: Tensor) -> Tensor:
        """Rounded numbers."""
        u = x if grid.before is None else x + grid.before
        bounds, step, zero = (getattr(grid, name) for name in (BOUNDS, STEP, ZERO))
        u = u if bounds is None else u.clamp(*bounds)
        return dequantize([quantize(u, step, zero, grid.name), step, zero], None)

    def weight(self, frozen: FrozenWeight, form: Stored) -> Tensor:
        """Codes by their scale."""
        turned, scale = frozen.stored.ndim == 2, getattr(frozen, FACTOR)
        axis = None if form.scale.numel() == 1 else 1 if turned else 0
        y = dequantize([getattr(frozen, CODES), scale], axis)
        return y.t() if turned else y
