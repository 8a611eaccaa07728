"""Quantized `timm.layers.Attention`: ViT, DeiT, DeiT-III, DINOv2, SigLIP, and SigLIP's head. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

import timm.layers as timm_layers
from timm.layers import AttentionPoolLatent
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor

from qat.nn.attention import QkrAttention, QuantAttention, register_attention
from qat.nn.swap_registry import Swap, SwapContext, register_swap


def masked(scores: Tensor, attn_mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Scores (B, h, N, N) with timm's meaning of a boolean, additive or causal mask."""
    return maybe_add_mask(
        scores, resolve_self_attn_mask(scores.shape[-1], scores, attn_mask, is_causal)
    )


class QuantVitAttention(QuantAttention):
    """Standard attention."""

    def forward(  # timm's signature
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C_out)."""
        qkv = self.qkv(x)
        out = None if is_causal or attn_mask is not None else self.fused(qkv, self.scale)
        if out is not None:
            return self.project(out, x)
        q, k, v = qkv.chunk(3, dim=-1)
        scores = self.scores(*self.heads(q, k)) * self.scale
        return self.attend(masked(scores, attn_mask, is_causal=is_causal), v, x)


class QkrVitAttention(QkrAttention):
    """Query-key reparameterization."""

    def forward(  # timm's signature
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C_out)."""
        out = None if is_causal or attn_mask is not None else self.fused(x, self.scale)
        if out is not None:
            return self.project(out, x)
        xq = self.input_quantizer(x)
        scores = self.scores(xq) * self.scale
        return self.attend(masked(scores, attn_mask, is_causal=is_causal), self.v(xq), x)


register_attention(timm_layers.Attention, QuantVitAttention, QkrVitAttention)


class QuantAttentionPool(QuantAttention):
    """SigLIP's head (arXiv 2303.15343), where learnt queries gather the tokens, quantized as standard attention.

    Its queries are parameters, not tokens, so query-key reparameterization has nothing to fold: every recipe but `float` gives
    this form.
    """

    def __init__(self, attention: AttentionPoolLatent, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.pool = attention.pool
        self.latent, self.pos_embed = attention.latent, attention.pos_embed
        self.q, self.kv = attention.q, attention.kv
        self.mlp = attention.mlp

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to (B, C_out), or to (B, L, C_out) where the L queries are not pooled."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        q = self.q(self.latent.expand(x.shape[0], -1, -1))
        k, v = self.kv(x).chunk(2, dim=-1)
        scores = maybe_add_mask(self.scores(*self.heads(q, k)) * self.scale, attn_mask)
        out = self.proj_drop(self.proj(self.gather(scores, v)))
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        return {"token": out[:, 0], "avg": out.mean(1)}.get(self.pool, out)

    def n_scores(self, x: Tensor) -> int:
        """A score per query, head and token."""
        return x.shape[0] * self.num_heads * self.latent.shape[1] * x.shape[1]


@register_swap(AttentionPoolLatent, "attention")
@register_swap(AttentionPoolLatent, "qkr_attention")
def swap_pool(module: AttentionPoolLatent, context: SwapContext) -> Swap:
    """Standard attention whatever the blocks have."""
    return Swap(QuantAttentionPool(module, context))
