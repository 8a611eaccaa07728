"""Quantized `nn.Linear`, and swaps of modules around it, such as LayerNorm, GELU and dropout."""

from __future__ import annotations

import timm.layers as timm_layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.kernels import LSQParams, Producer
from qat.kernels.fused import WeightParams, attach_source, can_fuse, lsq_linear
from qat.nn.fusing import activation_params, weight_params
from qat.nn.quant_module import QuantModule, is_hooked, shallow_cast
from qat.nn.signs import NEARLY_POSITIVE
from qat.nn.swap_registry import Swap, SwapContext, register_swap
from qat.quantizers import Quantizer


class QuantLinear(nn.Linear, QuantModule):
    """Computes q(x) @ q(W)^T + b, with the parameters and names of the Linear that it replaces.

    Args:
        linear: the module to replace.
        input_quantizer: quantizer of x (..., in), or `nn.Identity` if x is already quantized.
        weight_quantizer: quantizer of W (out, in).
    """

    def __init__(
        self, linear: nn.Linear, input_quantizer: nn.Module, weight_quantizer: Quantizer
    ) -> None:
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=has_bias, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        params = activation_params(self.input_quantizer) if can_fuse(x) else None
        if params is not None:
            return self._forward_fused(x, params)
        return F.linear(self.input_quantizer(x), self.quantized_weight("weight"), self.bias)

    def _forward_fused(self, x: Tensor, params: LSQParams) -> Tensor:
        """Compute `forward` as one fused Function, which saves fewer tensors for backward."""
        quantizer = weight_params(self, "weight")
        if quantizer is None:
            weight = self.quantized_weight("weight")
            return lsq_linear(x, params, weight, WeightParams(None), self.bias)
        return lsq_linear(x, params, self.weight, quantizer, self.bias)


@register_swap(nn.Linear, "linear")
@register_swap(timm_layers.Linear, "linear")
def swap_linear(module: nn.Linear, context: SwapContext) -> Swap:
    """Quantize a Linear."""
    return Swap(QuantLinear(module, context.input_quantizer(), context.weight()))


@register_swap(timm_layers.Mlp, "linear")
def swap_mlp(module: nn.Module, context: SwapContext) -> Swap:
    """Keep an `Mlp`, and mark the input of `fc2` as unsigned if it comes from `NEARLY_POSITIVE`.

    Checkpoints from versions without `ActivationTracer` depend on this mark (`signs="mlp"`, see
    `qat.model.convert.Conversion`).
    """
    follows_activation = isinstance(module.norm, nn.Identity)
    if follows_activation and isinstance(module.act, NEARLY_POSITIVE):
        return Swap(module, {"fc2": "unsigned"})
    return Swap(module)


@register_swap(nn.TransformerEncoderLayer, "linear")
def swap_encoder_layer(module: nn.Module, context: SwapContext) -> Swap:  # noqa: ARG001
    """Keep torch off its fast path, which would read the weights of quantized layers directly."""
    layer = shallow_cast(nn.TransformerEncoderLayer, module)
    layer.activation_relu_or_gelu = 0
    return Swap(layer)


def _can_attach_source(module: nn.Module, x: Tensor, out: Tensor) -> bool:
    """True if a quantized layer may save the input `x` of a module instead of its output `out`."""
    needs_grad = torch.is_grad_enabled() and out.requires_grad
    # A hook may request gradients of the output later.
    return can_fuse(x) and needs_grad and out.dtype == x.dtype and not is_hooked(module)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that lets a quantized layer save the norm's input instead of its output."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to the same shape."""
        out = super().forward(x)
        if _can_attach_source(self, x, out) and len(self.normalized_shape) == 1:
            return attach_source(out, Producer("norm", self.eps), x, self.weight, self.bias)
        return out


class GELU(nn.GELU):
    """`nn.GELU` that lets a quantized Linear save the input of the GELU instead of its output."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        out = super().forward(x)
        if _can_attach_source(self, x, out):
            kind = "gelu" if self.approximate == "none" else "gelu_tanh"
            return attach_source(out, Producer(kind), x)
        return out


class Dropout(nn.Dropout):
    """`nn.Dropout` that returns its input itself if it drops nothing, also in compiled graphs."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        if self.training and self.p:
            return super().forward(x)
        return x


@register_swap(nn.Dropout, "linear")
def swap_dropout(module: nn.Module, context: SwapContext) -> Swap:  # noqa: ARG001
    """Replace a dropout, so that a Linear after it can save the input of a GELU before it."""
    return Swap(shallow_cast(Dropout, module))


@register_swap(nn.LayerNorm, "linear")
@register_swap(timm_layers.LayerNorm, "linear")
def swap_norm(module: nn.Module, context: SwapContext) -> Swap:
    """Replace a norm by `LayerNorm`, except with placement `fqvit` or with timm's fast norm."""
    if context.recipe.placement == "fqvit" or getattr(module, "_fast_norm", False):
        return Swap(module)
    return Swap(shallow_cast(LayerNorm, module))


@register_swap(nn.GELU, "linear")
@register_swap(timm_layers.GELU, "linear")
@register_swap(timm_layers.GELUTanh, "linear")
def swap_gelu(module: nn.Module, context: SwapContext) -> Swap:
    """Replace a GELU by the `GELU` of this module, except with placement `fqvit`."""
    if context.recipe.placement == "fqvit":
        return Swap(module)
    gelu = shallow_cast(GELU, module)
    gelu.approximate = getattr(module, "approximate", "none")
    if isinstance(module, timm_layers.GELUTanh):
        gelu.approximate = "tanh"
    return Swap(gelu)
