"""Quantized attention with rotary positions: EVA-02, DINOv3, Perception Encoder.

Sources: arXiv 2104.09864, 2303.11331.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor

from qat.nn.attention import QuantAttention
from qat.nn.attention_swaps import register_attention
from qat.nn.swap_registry import SwapContext
from qat.nn.vit import apply_mask


class QuantRopeAttention(QuantAttention):
    """Attention whose queries and keys are rotated by position, then quantized.

    There is one Linear `qkv`, or one Linear each for q, k and v. Keys and values may have fewer
    heads than queries (grouped queries): each head of keys or values is quantized once, and a group
    of query heads shares it.
    """

    def __init__(self, attention: EvaAttention | AttentionRope, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.num_prefix_tokens = attention.num_prefix_tokens
        self.rotate_half = attention.rotate_half
        self.q_proj: Any = attention.q_proj
        self.k_proj: Any = attention.k_proj
        self.v_proj: Any = attention.v_proj

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002  (timm's signature)
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C_out).

        Args:
            x: (B, N, C).
            rope: (N - prefix, 2*d) or broadcastable, timm's embedding; None = no rotation.
            attn_mask: boolean (True = attend) or additive, broadcastable to (B, h, N, N).
            is_causal: True = mask later tokens, and ignore `attn_mask`.
        """
        q, k, v = self.project_qkv(x)
        q, k = self.to_heads(q, k)
        scores = self.scores(self._rotate(q, rope), self._rotate(k, rope)) * self.scale
        return self.attend(apply_mask(scores, attn_mask, is_causal=is_causal), v, x)

    def project_qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, N, h*d), and keys and values, which may have fewer heads."""
        if self.qkv is not None:
            return super().project_qkv(x)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _rotate(self, t: Tensor, rope: Tensor | None) -> Tensor:
        """Rotate queries or keys (B, h, N, d), except for the prefix tokens."""
        if rope is None:
            return t
        prefix = t[:, :, : self.num_prefix_tokens]
        patches = t[:, :, self.num_prefix_tokens :]
        rotated = apply_rot_embed_cat(patches, rope, half=self.rotate_half)
        return torch.cat([prefix, rotated], dim=2).type_as(t)


for _cls in (EvaAttention, AttentionRope):
    register_attention(
        _cls,
        QuantRopeAttention,
        "rotates queries and keys by position",
        also_float=_cls is EvaAttention,
    )
