"""Quantized `AttentionPoolLatent`: SigLIP's head, where learnt queries gather the tokens (arXiv 2303.15343)."""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from timm.layers.attention import maybe_add_mask
from torch import Tensor

from qat.nn.attention import QuantAttention, split_heads
from qat.nn.swap_registry import Swap, SwapContext, register_swap


class QuantAttentionPool(QuantAttention):
    """Pooling by attention, quantized as standard attention. Keeps timm's names.

    Its queries are parameters, not tokens, so query-key reparameterization has nothing to fold: every recipe but `float` gives
    this form.
    """

    def __init__(self, attention: AttentionPoolLatent, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.scale = attention.scale
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
        q, k = self.q_norm(split_heads(q, self.num_heads)), self.k_norm(split_heads(k, self.num_heads))
        scores = maybe_add_mask(self.scores(q, k) * self.scale, attn_mask)
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
