"""Quantized attention of `vit_relpos_*`: a bias from relative positions, of the block's own or shared by all."""

from __future__ import annotations

from timm.layers import RelPosMlp
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from qat.nn.attention import QkrAttention, QuantAttention, register_attention
from qat.nn.swap_registry import Swap, SwapContext, register_swap


def _biased(scores: Tensor, rel_pos: nn.Module | None, shared: Tensor | None) -> Tensor:
    """Add a bias to the scores (B, h, N, N): the block's own where it has one, else the shared one."""
    if rel_pos is not None:
        return rel_pos(scores, shared_rel_pos=shared)
    return scores if shared is None else scores + shared


class QuantRelPosAttention(QuantAttention):
    """Standard attention."""

    def __init__(self, attention: RelPosAttention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.rel_pos = attention.rel_pos

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to the same shape."""
        q, k, v = self.projected(x)
        return self.attend(
            _biased(self.scores(*self.heads(q, k)) * self.scale, self.rel_pos, shared_rel_pos), v, x
        )


class QkrRelPosAttention(QkrAttention):
    """Query-key reparameterization."""

    def __init__(self, attention: RelPosAttention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.rel_pos = attention.rel_pos

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to the same shape."""
        xq = self.input_quantizer(x)
        return self.attend(
            _biased(self.scores(xq) * self.scale, self.rel_pos, shared_rel_pos), self.v(xq), x
        )


register_attention(RelPosAttention, QuantRelPosAttention, QkrRelPosAttention)


@register_swap(RelPosMlp, "linear")
def keep_bias_float(module: nn.Module, context: SwapContext) -> Swap:
    """The small net that makes the bias stays float: its output is a table that depends on no image."""
    return Swap(module, {"mlp": "float"})
