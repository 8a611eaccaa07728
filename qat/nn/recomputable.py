"""Norms and activations that say what their output was made of, so that a quantized Linear after them keeps no copy of it."""

from __future__ import annotations

import functools

import timm.layers as timm_layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.kernels.fused import can_fuse, remember
from qat.nn.quant_module import shallow_cast
from qat.nn.swap_registry import Swap, SwapContext, register_swap


def _is_kept(x: Tensor, made: Tensor) -> bool:
    return can_fuse(x) and torch.is_grad_enabled() and made.requires_grad and made.dtype == x.dtype


class LayerNorm(nn.LayerNorm):
    """Torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to the same shape."""
        made = super().forward(x)
        if not _is_kept(x, made):
            return made
        again = functools.partial(F.layer_norm, normalized_shape=self.normalized_shape, eps=self.eps)
        return remember(made, lambda x, weight, bias: again(x, weight=weight, bias=bias), x, self.weight, self.bias)


class GELU(nn.GELU):
    """Torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        made = super().forward(x)
        return remember(made, functools.partial(F.gelu, approximate=self.approximate), x) if _is_kept(x, made) else made


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
    made.approximate = "tanh" if isinstance(module, timm_layers.GELUTanh) else getattr(module, "approximate", "none")
    return Swap(made)
