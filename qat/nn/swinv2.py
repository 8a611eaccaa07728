"""Quantized Swin v2: cosine attention with a bias that a small net makes from relative positions (arXiv 2111.09883)."""

from __future__ import annotations

import math

import torch
from timm.models.swin_transformer_v2 import WindowAttention
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from qat.nn.attention import QuantAttention, add_window_mask, register_attention
from qat.nn.swap_registry import Swap, SwapContext, register_swap

# Swin v2, section 3.2: the learnt temperature is kept above 0.01, the bias between 0 and 16.
_LOWEST_TEMPERATURE = 0.01
_HIGHEST_BIAS = 16


class QuantCosineAttention(QuantAttention):
    """Window attention on normalised queries and keys, which are quantized after the norm.

    `cpb_mlp` stays float: its output is a table that depends on no image.
    """

    relative_coords_table: Tensor
    relative_position_index: Tensor

    def __init__(self, attention: WindowAttention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.logit_scale = attention.logit_scale
        self.cpb_mlp = attention.cpb_mlp
        for name in ("relative_coords_table", "relative_position_index"):
            self.register_buffer(name, getattr(attention, name), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B*windows, N, C) to the same shape; the mask (windows, N, N) is that of a cyclic shift."""
        q, k, v = self.projected(x)
        q, k = (F.normalize(t, dim=-1) for t in self.heads(q, k))
        scores = (
            self.scores(q, k) * self.logit_scale.clamp(max=-math.log(_LOWEST_TEMPERATURE)).exp()
        )
        return self.attend(add_window_mask(scores + self._position_bias(), mask), v, x)

    def _position_bias(self) -> Tensor:
        """(h, N, N)."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        return _HIGHEST_BIAS * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1))


_WHY = "normalises queries and keys (cosine attention)"
register_attention(
    WindowAttention, QuantCosineAttention, _WHY, inputs={"cpb_mlp": "float"}, also_float=True
)


@register_swap(WindowMultiHeadAttention, "linear")
def keep_bias_float(module: nn.Module, context: SwapContext) -> Swap:
    """In `swinv2_cr_*` the attention stays float around its Linears, and so does the small net that makes its bias."""
    return Swap(module, {"meta_mlp": "float"})
