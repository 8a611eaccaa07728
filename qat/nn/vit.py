"""Quantized `timm.layers.Attention`: ViT, DeiT, DeiT-III, DINOv2, SigLIP. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

import timm.layers as timm_layers
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor, nn

from qat.nn.attention import QkrAttention, QuantAttention, refuse_qkr, split_heads
from qat.nn.swap_registry import Swap, SwapContext, register_swap


def masked(scores: Tensor, attn_mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Scores (B, h, N, N) with timm's meaning of a boolean, additive or causal mask."""
    return maybe_add_mask(scores, resolve_self_attn_mask(scores.shape[-1], scores, attn_mask, is_causal))


def normalises(module: nn.Module) -> bool:
    """True if queries or keys pass a norm, so that no single matrix M exists."""
    return not (isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity))


class QuantVitAttention(QuantAttention):
    """Standard attention. Keeps timm's `qkv` and `proj`."""

    def __init__(self, attention: timm_layers.Attention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.scale = attention.scale
        self.qkv = attention.qkv

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: FBT001, FBT002  (timm's signature)
        """Map (B, N, C) to (B, N, C_out)."""
        qkv = self.qkv(x)
        out = None if is_causal or attn_mask is not None else self.fused(qkv, self.scale)
        if out is not None:
            return self.project(out, x)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = split_heads(q, self.num_heads), split_heads(k, self.num_heads)
        scores = self.scores(self.q_norm(q), self.k_norm(k)) * self.scale
        return self.attend(masked(scores, attn_mask, is_causal=is_causal), v, x)


class QkrVitAttention(QkrAttention):
    """Query-key reparameterization."""

    def __init__(self, attention: timm_layers.Attention, context: SwapContext) -> None:
        super().__init__(attention, context, attention.qkv.bias)
        self.scale = attention.scale

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: FBT001, FBT002  (timm's signature)
        """Map (B, N, C) to (B, N, C_out)."""
        out = None if is_causal or attn_mask is not None else self.fused(x, self.scale)
        if out is not None:
            return self.project(out, x)
        xq = self.input_quantizer(x)
        scores = self.scores(xq) * self.scale
        return self.attend(masked(scores, attn_mask, is_causal=is_causal), self.v(xq), x)


@register_swap(timm_layers.Attention, "attention")
def swap_attention(module: timm_layers.Attention, context: SwapContext) -> Swap:
    """Standard attention."""
    return Swap(QuantVitAttention(module, context))


@register_swap(timm_layers.Attention, "qkr_attention")
def swap_qkr_attention(module: timm_layers.Attention, context: SwapContext) -> Swap:
    """Query-key reparameterization; the input of `v` is quantized already.

    Raises:
        UsageError: queries or keys are normalised.
    """
    if normalises(module):
        refuse_qkr("normalises queries and keys")
    return Swap(QkrVitAttention(module, context), {"v": "quantized"})
