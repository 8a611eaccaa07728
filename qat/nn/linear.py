"""Quantized `nn.Linear`, and timm's `Mlp`, whose second Linear has a non-negative input."""

from __future__ import annotations

import timm.layers as timm_layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.kernels import Made
from qat.kernels.fused import WeightParams, can_fuse, lsq_linear, remember
from qat.nn.fusing import operand_of, weight_params
from qat.nn.quant_module import QuantModule, is_watched, shallow_cast
from qat.nn.swap_registry import Swap, SwapContext, register_swap
from qat.quantizers import Quantizer

# Activations whose negative tail is small enough for an unsigned grid; the learnt offset in front recovers the rest.
_NEARLY_POSITIVE = (
    nn.GELU,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    timm_layers.GELU,
    timm_layers.GELUTanh,
    timm_layers.QuickGELU,
)


class QuantLinear(nn.Linear, QuantModule):
    """q(x) @ q(W)^T + b. Parameters keep timm's names and are the very objects of the Linear it replaces.

    Args:
        linear: the module to replace.
        input_quantizer: quantizer of x (..., in), or `nn.Identity` where the input is quantized already.
        weight_quantizer: quantizer of W (out, in).
    """

    def __init__(
        self, linear: nn.Linear, input_quantizer: nn.Module, weight_quantizer: Quantizer
    ) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
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
@register_swap(timm_layers.Linear, "linear")
def swap_linear(module: nn.Linear, context: SwapContext) -> Swap:
    """Any Linear."""
    return Swap(QuantLinear(module, context.input_quantizer(), context.weight()))


@register_swap(timm_layers.Mlp, "linear")
def hint_mlp(module: nn.Module, context: SwapContext) -> Swap:
    """`Mlp` stays; its `fc2` knows that GELU stands before it."""
    behind_activation = isinstance(module.act, _NEARLY_POSITIVE) and isinstance(
        module.norm, nn.Identity
    )
    return Swap(module, {"fc2": "unsigned"} if behind_activation else {})


def _is_kept(module: nn.Module, x: Tensor, made: Tensor) -> bool:
    # What a hook is given may be differentiated by later on.
    return (
        can_fuse(x)
        and torch.is_grad_enabled()
        and made.requires_grad
        and made.dtype == x.dtype
        and not is_watched(module)
    )


class LayerNorm(nn.LayerNorm):
    """Torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to the same shape."""
        made = super().forward(x)
        if not (_is_kept(self, x, made) and len(self.normalized_shape) == 1):
            return made
        return remember(made, Made("norm", self.eps), x, self.weight, self.bias)


class GELU(nn.GELU):
    """Torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        made = super().forward(x)
        return remember(made, Made(self.approximate), x) if _is_kept(self, x, made) else made


class Dropout(nn.Dropout):
    """Torch's; what it lets through whole keeps the note of how it was made, in a compiled graph too."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return super().forward(x) if self.training and self.p else x


@register_swap(nn.Dropout, "linear")
def swap_dropout(module: nn.Module, context: SwapContext) -> Swap:  # noqa: ARG001  (as any swap)
    """Between an activation and a quantized Linear."""
    return Swap(shallow_cast(Dropout, module))


@register_swap(nn.LayerNorm, "linear")
@register_swap(timm_layers.LayerNorm, "linear")
def swap_norm(module: nn.Module, context: SwapContext) -> Swap:
    """A norm before quantized Linears; it stays under post-training quantization, and where timm was set to use another kernel."""
    stays = context.recipe.placement == "fqvit" or getattr(module, "_fast_norm", False)
    return Swap(module if stays else shallow_cast(LayerNorm, module))


@register_swap(nn.GELU, "linear")
@register_swap(timm_layers.GELU, "linear")
@register_swap(timm_layers.GELUTanh, "linear")
def swap_gelu(module: nn.Module, context: SwapContext) -> Swap:
    """An activation before quantized Linears."""
    if context.recipe.placement == "fqvit":
        return Swap(module)
    made = shallow_cast(GELU, module)
    made.approximate = (
        "tanh"
        if isinstance(module, timm_layers.GELUTanh)
        else getattr(module, "approximate", "none")
    )
    return Swap(made)
