"""Quantized `timm.layers.Attention` (ViT, DeiT, DeiT-III, DINOv2, SigLIP), and SigLIP's head.

Source: OFQ, arXiv 2302.02210.
"""

from __future__ import annotations

import timm.layers as timm_layers
from timm.layers import AttentionPoolLatent
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor

from qat.nn.attention import QuantAttention
from qat.nn.attention_swaps import register_attention
from qat.nn.qkr_attention import QkrAttention
from qat.nn.swap_registry import Swap, SwapContext, register_swap


def apply_mask(scores: Tensor, attn_mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Apply a causal mask, or else `attn_mask`, to scores (B, h, N, N).

    A boolean mask keeps scores where it is True, other masks are added; None has no effect.
    """
    mask = resolve_self_attn_mask(scores.shape[-1], scores, attn_mask, is_causal)
    return maybe_add_mask(scores, mask)


class QuantVitAttention(QuantAttention):
    """Quantized ViT attention without query-key reparameterization (`attention=standard`)."""

    def forward(  # timm's signature
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C_out)."""
        qkv = self.qkv(x)
        has_mask = is_causal or attn_mask is not None
        out = None if has_mask else self.compute_fused(qkv, self.scale)
        if out is None:
            q, k, v = qkv.chunk(3, dim=-1)
            scores = self.scores(*self.to_heads(q, k)) * self.scale
            out = self.weigh_values(apply_mask(scores, attn_mask, is_causal=is_causal), v)
        return self.project(out, x)


class QkrVitAttention(QkrAttention):
    """Quantized ViT attention with query-key reparameterization (`attention=qkr`)."""

    def forward(  # timm's signature
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C_out)."""
        has_mask = is_causal or attn_mask is not None
        out = None if has_mask else self.compute_fused(x, self.scale)
        if out is None:
            x_q = self.input_quantizer(x)
            scores = apply_mask(self.scores(x_q) * self.scale, attn_mask, is_causal=is_causal)
            out = self.weigh_values(scores, self.v(x_q))
        return self.project(out, x)


register_attention(timm_layers.Attention, QuantVitAttention, QkrVitAttention)


class QuantAttentionPool(QuantAttention):
    """SigLIP's head (arXiv 2303.15343), in which learned queries attend to the tokens.

    The queries are parameters, not tokens, so query-key reparameterization has nothing to fold. The
    head is therefore quantized as standard attention, except with `attention=float`.
    """

    def __init__(self, attention: AttentionPoolLatent, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.pool = attention.pool
        self.latent = attention.latent
        self.pos_embed = attention.pos_embed
        self.q = attention.q
        self.kv = attention.kv
        self.mlp = attention.mlp

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to (B, C_out), or to (B, L, C_out) if the L queries are not pooled."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        q = self.q(self.latent.expand(x.shape[0], -1, -1))
        k, v = self.kv(x).chunk(2, dim=-1)
        scores = maybe_add_mask(self.scores(*self.to_heads(q, k)) * self.scale, attn_mask)
        out = self.proj_drop(self.proj(self.weigh_values(scores, v)))
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        if self.pool == "token":
            return out[:, 0]
        if self.pool == "avg":
            return out.mean(1)
        return out

    def num_scores(self, x: Tensor) -> int:
        """Number of scores for x (B, N, C): one per image, query, head and token."""
        return x.shape[0] * self.num_heads * self.latent.shape[1] * x.shape[1]


@register_swap(AttentionPoolLatent, "attention")
@register_swap(AttentionPoolLatent, "qkr_attention")
def swap_pool(module: AttentionPoolLatent, context: SwapContext) -> Swap:
    """Quantize the pooling head in the standard form, even if the blocks use QKR."""
    return Swap(QuantAttentionPool(module, context))
