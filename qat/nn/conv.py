"""Quantized `nn.Conv2d`: the patch embedding, and convolutions inside other nets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.nn.quant_module import QuantModule
from qat.nn.swap_registry import Swap, SwapContext, register_swap
from qat.quantizers import Quantizer


class QuantConv2d(nn.Conv2d, QuantModule):
    """conv(q(x), q(W)) + b. Parameters keep timm's names and are the very objects of the convolution it replaces.

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
        self.weight, self.bias = conv.weight, conv.bias
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H', W')."""
        xq, wq = self.input_quantizer(x), self.quantized("weight")
        # Evaluation sums as frozen and exported forms do: a scale of a whole tensor carries the last bit into every code.
        by_patches = torch.is_grad_enabled() and self.is_patchwise
        return self._by_patches(xq, wq) if by_patches else self._conv_forward(xq, wq, self.bias)

    @property
    def is_patchwise(self) -> bool:
        """True if no two outputs see the same pixel, as in a patch embedding, and the input's quantizer learns."""
        learns = next(self.input_quantizer.parameters(), None) is not None
        side_by_side = (
            self.kernel_size == self.stride
            and self.padding in {(0, 0), "valid"}
            and self.dilation == (1, 1)
        )
        return learns and side_by_side and self.groups == 1

    def _by_patches(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution as one matrix product.

        What the image's quantizer learns takes the gradient of its output, for which a convolution needs several times as long.
        """
        kh, kw = self.kernel_size
        rows, columns = x.shape[2] // kh, x.shape[3] // kw
        x = x[..., : rows * kh, : columns * kw].unflatten(3, (columns, kw)).unflatten(2, (rows, kh))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return (
            F
            .linear(patches, weight.flatten(1), self.bias)
            .transpose(-2, -1)
            .unflatten(-1, (rows, columns))
        )


@register_swap(nn.Conv2d, "conv")
def swap_conv(module: nn.Conv2d, context: SwapContext) -> Swap:
    """Any convolution; the input of the first one is the image."""
    image = context.place == "stem"
    return Swap(
        QuantConv2d(
            module,
            context.input_quantizer("image") if image else context.planes(),
            context.weight(),
        )
    )
