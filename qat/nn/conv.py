"""Quantized `nn.Conv2d`: the patch embedding, and convolutions inside other models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.nn.quant_module import QuantModule
from qat.nn.swap_registry import Swap, SwapContext, register_swap
from qat.quantizers import Quantizer


class QuantConv2d(nn.Conv2d, QuantModule):
    """Computes conv(q(x), q(W)) + b with the parameters of the convolution that it replaces.

    Args:
        conv: the module to replace.
        input_quantizer: quantizer of x (B, I, H, W).
        weight_quantizer: quantizer of W (O, I/groups, kh, kw).
    """

    def __init__(
        self, conv: nn.Conv2d, input_quantizer: nn.Module, weight_quantizer: Quantizer
    ) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        self.weight = conv.weight
        self.bias = conv.bias
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H', W')."""
        x_q = self.input_quantizer(x)
        weight_q = self.quantized_weight("weight")
        # Without gradients, sum in the same order as frozen and exported models. A later quantizer
        # may compute one scale from this whole output; a difference in the last bit of that scale
        # affects all codes.
        if torch.is_grad_enabled() and self.is_patchwise:
            return self._convolve_patches(x_q, weight_q)
        return self._conv_forward(x_q, weight_q, self.bias)

    @property
    def is_patchwise(self) -> bool:
        """True for a learned input quantizer and adjacent patches without padding or groups."""
        learns = next(self.input_quantizer.parameters(), None) is not None
        has_no_overlap = self.kernel_size == self.stride and self.dilation == (1, 1)
        has_no_padding = self.padding in {(0, 0), "valid"}
        return learns and has_no_overlap and has_no_padding and self.groups == 1

    def _convolve_patches(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the convolution as one matrix product.

        The input quantizer learns from the gradient of the input. With a convolution, computing
        this gradient takes several times as long.
        """
        height, width = self.kernel_size
        rows = x.shape[2] // height
        columns = x.shape[3] // width
        x = x[..., : rows * height, : columns * width]
        x = x.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        out = F.linear(patches, weight.flatten(1), self.bias)
        return out.transpose(-2, -1).unflatten(-1, (rows, columns))


@register_swap(nn.Conv2d, "conv")
def swap_conv(module: nn.Conv2d, context: SwapContext) -> Swap:
    """Quantize a convolution; the input of the first convolution is the image."""
    is_first = context.place == "stem"
    input_quantizer = (
        context.input_quantizer("image") if is_first else context.conv_input_quantizer()
    )
    return Swap(QuantConv2d(module, input_quantizer, context.weight()))
