"""Quantized attention of `vit_relpos_*`, with a bias by relative positions.

Each block has a bias of its own, or all blocks share one.
"""

from __future__ import annotations

from timm.layers import RelPosMlp
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from qat.nn.attention import QuantAttention
from qat.nn.attention_swaps import register_attention
from qat.nn.qkr_attention import QkrAttention
from qat.nn.swap_registry import Swap, SwapContext, register_swap


def _add_bias(scores: Tensor, rel_pos: nn.Module | None, shared: Tensor | None) -> Tensor:
    """Add the block's own bias to scores (B, h, N, N); without one, the shared bias, if any."""
    if rel_pos is not None:
        return rel_pos(scores, shared_rel_pos=shared)
    return scores if shared is None else scores + shared


class QuantRelPosAttention(QuantAttention):
    """Quantized `vit_relpos` attention without query-key reparameterization (`standard`)."""

    def __init__(self, attention: RelPosAttention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.rel_pos = attention.rel_pos

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to the same shape."""
        q, k, v = self.project_qkv(x)
        scores = self.scores(*self.to_heads(q, k)) * self.scale
        return self.attend(_add_bias(scores, self.rel_pos, shared_rel_pos), v, x)


class QkrRelPosAttention(QkrAttention):
    """Quantized `vit_relpos` attention with query-key reparameterization (`attention=qkr`)."""

    def __init__(self, attention: RelPosAttention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.rel_pos = attention.rel_pos

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to the same shape."""
        x_q = self.input_quantizer(x)
        scores = _add_bias(self.scores(x_q) * self.scale, self.rel_pos, shared_rel_pos)
        return self.attend(scores, self.v(x_q), x)


register_attention(RelPosAttention, QuantRelPosAttention, QkrRelPosAttention)


@register_swap(RelPosMlp, "linear")
def keep_bias_float(module: nn.Module, context: SwapContext) -> Swap:
    """Keep the small network of the bias in float: it computes the same table for all images."""
    return Swap(module, {"mlp": "float"})
