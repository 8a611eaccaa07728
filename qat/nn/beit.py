"""Quantized BEiT attention, which has biases separate from `qkv` and a relative position bias.

Source: arXiv 2106.08254.
"""

from __future__ import annotations

from timm.models.beit import Attention
from torch import Tensor

from qat.nn.attention import QuantAttention
from qat.nn.attention_swaps import register_attention
from qat.nn.qkr_attention import QkrAttention
from qat.nn.score_terms import RelativeBias


class _BeitBias(RelativeBias):
    """Relative position bias from the attention's own table, a shared table, both or neither."""

    def add_biases(self, scores: Tensor, shared: Tensor | None) -> Tensor:
        """Add the biases to scores (B, h, N, N)."""
        if self.relative_position_bias_table is not None:
            scores = scores + self.position_bias()
        return scores if shared is None else scores + shared


class QuantBeitAttention(_BeitBias, QuantAttention):
    """Quantized BEiT attention without query-key reparameterization (`attention=standard`)."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to the same shape."""
        q, k, v = self.project_qkv(x)
        scores = self.scores(*self.to_heads(q, k)) * self.scale
        return self.attend(self.add_biases(scores, shared_rel_pos_bias), v, x)


class QkrBeitAttention(_BeitBias, QkrAttention):
    """Quantized BEiT attention with query-key reparameterization (`attention=qkr`).

    timm's `v_bias` becomes the bias of the child `v`.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to the same shape."""
        x_q = self.input_quantizer(x)
        scores = self.add_biases(self.scores(x_q) * self.scale, shared_rel_pos_bias)
        return self.attend(scores, self.v(x_q), x)

    def timm_weights(self) -> dict[str, Tensor]:
        """Tensors of timm's module: the weight of `qkv`; the biases and the table if present."""
        state = {"qkv.weight": super().timm_weights()["qkv.weight"]}
        if self.v.bias is not None:
            state["q_bias"] = self._query_bias().detach()
            state["v_bias"] = self.v.bias.detach()
        if self.relative_position_bias_table is not None:
            state["relative_position_bias_table"] = self.relative_position_bias_table.detach()
        return state


register_attention(Attention, QuantBeitAttention, QkrBeitAttention, also_float=True)
