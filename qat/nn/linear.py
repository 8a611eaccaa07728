"""Quantized `nn.Linear`, and timm's `Mlp`, whose second Linear has a non-negative input."""

from __future__ import annotations

import timm.layers as timm_layers
from torch import Tensor, nn
from torch.nn import functional as F

from qat.kernels.fused import WeightParams, can_fuse, lsq_linear
from qat.nn.fusing import operand_of, weight_params
from qat.nn.quant_module import QuantModule
from qat.nn.swap_registry import Swap, SwapContext, register_swap
from qat.quantizers import Quantizer

# Activations whose negative tail is small enough for an unsigned grid; the learnt offset in front recovers the rest.
_NEARLY_POSITIVE = (nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, timm_layers.GELU, timm_layers.GELUTanh, timm_layers.QuickGELU)


class QuantLinear(nn.Linear, QuantModule):
    """q(x) @ q(W)^T + b. Parameters keep timm's names and are the very objects of the Linear it replaces.

    Args:
        linear: the module to replace.
        input_quantizer: quantizer of x (..., in), or `nn.Identity` where the input is quantized already.
        weight_quantizer: quantizer of W (out, in).
    """

    def __init__(self, linear: nn.Linear, input_quantizer: nn.Module, weight_quantizer: Quantizer) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        operand = operand_of(self.input_quantizer) if can_fuse(x) else None
        if operand is None:
            return F.linear(self.input_quantizer(x), self.quantized("weight"), self.bias)
        params = weight_params(self, "weight")
        if params is None:
            return lsq_linear(x, operand, self.quantized("weight"), WeightParams(None), self.bias)
        return lsq_linear(x, operand, self.weight, params, self.bias)


@register_swap(nn.Linear, "linear")
def swap_linear(module: nn.Linear, context: SwapContext) -> Swap:
    """Any Linear."""
    return Swap(QuantLinear(module, context.input_quantizer(), context.weight()))


@register_swap(timm_layers.Mlp, "linear")
def hint_mlp(module: nn.Module, context: SwapContext) -> Swap:
    """`Mlp` stays; its `fc2` knows that GELU stands before it."""
    behind_activation = isinstance(module.act, _NEARLY_POSITIVE) and isinstance(module.norm, nn.Identity)
    return Swap(module, {"fc2": "unsigned"} if behind_activation else {})
