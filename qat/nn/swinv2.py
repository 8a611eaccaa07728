"""Quantized Swin v2: cosine attention, and a bias that a small network computes from positions.

Source: arXiv 2111.09883.
"""

from __future__ import annotations

import math

import torch
from timm.models.swin_transformer_v2 import WindowAttention
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from qat.nn.attention import QuantAttention
from qat.nn.attention_swaps import register_attention
from qat.nn.score_terms import add_window_mask
from qat.nn.swap_registry import Swap, SwapContext, register_swap

# Swin v2, section 3.2: the learned temperature is at least 0.01. In timm, biases are in [0, 16].
_MIN_TEMPERATURE = 0.01
_MAX_BIAS = 16


class QuantCosineAttention(QuantAttention):
    """Window attention on normalized queries and keys, which are quantized after the norm.

    `cpb_mlp` stays float: it computes the same table for all images.
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
        """Map (B*windows, N, C) to the same shape; see `add_window_mask` for the mask."""
        q, k, v = self.project_qkv(x)
        q, k = self.to_heads(q, k)
        scores = self.scores(F.normalize(q, dim=-1), F.normalize(k, dim=-1))
        scores = scores * self.logit_scale.clamp(max=-math.log(_MIN_TEMPERATURE)).exp()
        return self.attend(add_window_mask(scores + self._position_bias(), mask), v, x)

    def _position_bias(self) -> Tensor:
        """The bias (h, N, N) to add to scaled scores."""
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        return _MAX_BIAS * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1))


register_attention(
    WindowAttention,
    QuantCosineAttention,
    "normalizes queries and keys (cosine attention)",
    inputs={"cpb_mlp": "float"},
    also_float=True,
)


@register_swap(WindowMultiHeadAttention, "linear")
def keep_bias_float(module: nn.Module, context: SwapContext) -> Swap:
    """Keep the attention of `swinv2_cr_*` in float, except for its Linears.

    The network that computes the bias stays in float entirely.
    """
    return Swap(module, {"meta_mlp": "float"})
