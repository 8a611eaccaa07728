"""Quantized BEiT: `q_bias` and `v_bias` beside `qkv`, relative position bias with a class token (arXiv 2106.08254)."""

from __future__ import annotations

from typing import Any

from timm.models.beit import Attention
from torch import Tensor, nn

from qat.nn.attention import QkrAttention, QuantAttention, qkv_bias, split_heads
from qat.nn.swap_registry import Swap, SwapContext, register_swap


class _OptionalRelativeBias(nn.Module):
    """The bias of the attention's own table, of a table that all blocks share, of both, or none; float, added to scaled scores."""

    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Tensor | None

    def take_table(self, attention: Any) -> None:
        """Take over the table and its index."""
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.register_buffer("relative_position_index", attention.relative_position_index, persistent=False)

    def biased(self, scores: Tensor, shared: Tensor | None) -> Tensor:
        """Add what there is to the scores (B, h, N, N)."""
        if self.relative_position_bias_table is not None:
            scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        return scores if shared is None else scores + shared


class QuantBeitAttention(QuantAttention, _OptionalRelativeBias):
    """Standard attention. Keeps timm's names."""

    def __init__(self, attention: Attention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.scale = attention.scale
        self.qkv = attention.qkv
        self.q_bias, self.v_bias = attention.q_bias, attention.v_bias
        self.take_table(attention)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to the same shape."""
        qkv, bias = self.qkv(x), qkv_bias(self)
        q, k, v = (qkv if bias is None else qkv + bias).chunk(3, dim=-1)
        scores = self.scores(split_heads(q, self.num_heads), split_heads(k, self.num_heads)) * self.scale
        return self.attend(self.biased(scores, shared_rel_pos_bias), v, x)


class QkrBeitAttention(QkrAttention, _OptionalRelativeBias):
    """Query-key reparameterization; timm's `v_bias` is the bias of `v`."""

    def __init__(self, attention: Attention, context: SwapContext) -> None:
        super().__init__(attention, context, qkv_bias(attention))
        self.scale = attention.scale
        self.take_table(attention)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to the same shape."""
        xq = self.input_quantizer(x)
        scores = self.biased(self.scores(xq) * self.scale, shared_rel_pos_bias)
        return self.attend(scores, self.v(xq), x)

    def timm_weights(self) -> dict[str, Tensor]:
        """`qkv` without bias, the two biases, and the table."""
        state = {"qkv.weight": super().timm_weights()["qkv.weight"]}
        if self.v.bias is not None:
            state |= {"q_bias": self._query_bias().detach(), "v_bias": self.v.bias.detach()}
        if self.relative_position_bias_table is not None:
            state["relative_position_bias_table"] = self.relative_position_bias_table.detach()
        return state


@register_swap(Attention, "attention")
@register_swap(Attention, "float_attention")
def swap_attention(module: Attention, context: SwapContext) -> Swap:
    """Standard attention, with a float recipe around float q, k, v and probabilities."""
    return Swap(QuantBeitAttention(module, context))


@register_swap(Attention, "qkr_attention")
def swap_qkr_attention(module: Attention, context: SwapContext) -> Swap:
    """Query-key reparameterization; the input of `v` is quantized already."""
    return Swap(QkrBeitAttention(module, context), {"v": "quantized"})
