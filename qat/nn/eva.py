"""Quantized attention with rotary positions: EVA-02, DINOv3, Perception Encoder (arXiv 2104.09864, 2303.11331)."""

from __future__ import annotations

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor

from qat.nn.attention import QuantAttention, register_attention
from qat.nn.swap_registry import SwapContext
from qat.nn.vit import masked


class QuantRopeAttention(QuantAttention):
    """Attention whose queries and keys are rotated by position, then quantized; `qkv` fused or not.

    Keys and values may have fewer heads than queries (grouped queries): each is quantized once, then shared by its group.
    """

    def __init__(self, attention: EvaAttention | AttentionRope, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.num_prefix_tokens = attention.num_prefix_tokens
        self.rotate_half = attention.rotate_half
        self.q_proj, self.k_proj, self.v_proj = (
            getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")
        )

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002  (timm's signature)
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C_out); rope (N - prefix, 2*d) or broadcastable, as timm makes it."""
        q, k, v = self.projected(x)
        q, k = (self._rotated(t, rope) for t in self.heads(q, k))
        scores = self.scores(q, k) * self.scale
        return self.attend(masked(scores, attn_mask, is_causal=is_causal), v, x)

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, N, h*d), keys and values."""
        return (
            (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            if self.qkv is None
            else super().projected(x)
        )

    def _rotated(self, t: Tensor, rope: Tensor | None) -> Tensor:
        if rope is None:
            return t
        prefix, patches = t[:, :, : self.num_prefix_tokens], t[:, :, self.num_prefix_tokens :]
        return torch.cat(
            [prefix, apply_rot_embed_cat(patches, rope, half=self.rotate_half)], dim=2
        ).type_as(t)


for _cls in (EvaAttention, AttentionRope):
    register_attention(
        _cls,
        QuantRopeAttention,
        "rotates queries and keys by position",
        also_float=_cls is EvaAttention,
    )
