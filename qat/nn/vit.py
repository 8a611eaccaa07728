"""Quantized `timm.layers.Attention`: standard, and with query-key reparameterization. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

import timm.layers as timm_layers
import torch
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import UsageError
from qat.functional.qkr import fold_q_bias, fold_qk
from qat.nn.base import QuantModule
from qat.nn.registry import Swap, SwapContext, register_swap


class _ScoredAttention(QuantModule):
    """What both forms share: everything from the scores on.

    Args:
        attention: the timm module whose settings and output layers are taken over.
        context: recipe and place.
    """

    def __init__(self, attention: timm_layers.Attention, context: SwapContext) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.attn_dim = attention.attn_dim
        self.scale = attention.scale
        self.v_quantizer = context.act("v")
        self.probs_quantizer = context.act("probs")
        self.attn_drop = attention.attn_drop
        self.norm = attention.norm
        self.gate = attention.gate
        self.proj = attention.proj
        self.proj_drop = attention.proj_drop

    def attend(self, scores: Tensor, v: Tensor, x: Tensor, attn_mask: Tensor | None, *, is_causal: bool) -> Tensor:
        """Softmax, probabilities times values, projection.

        Args:
            scores: (B, h, N, N), scaled.
            v: (B, N, h*d), not yet quantized.
            x: (B, N, C), the input of the attention; only a gate reads it.
            attn_mask: additive or boolean, broadcasts against the scores.
            is_causal: mask the future.

        Returns:
            (B, N, C_out).
        """
        scores = maybe_add_mask(scores, resolve_self_attn_mask(scores.shape[-1], scores, attn_mask, is_causal))
        probs = self.attn_drop(self.probs_quantizer(scores.softmax(dim=-1)))
        values = self.v_quantizer(v).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = self.norm((probs @ values).transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class QuantAttention(_ScoredAttention):
    """Attention with quantized q, k, v and probabilities. Keeps timm's `qkv` and `proj`."""

    def __init__(self, attention: timm_layers.Attention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.qkv = attention.qkv
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.q_quantizer = context.act("q")
        self.k_quantizer = context.act("k")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: FBT001, FBT002  (timm's signature)
        """Map (B, N, C) to (B, N, C_out)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self._heads(q, self.q_norm, self.q_quantizer), self._heads(k, self.k_norm, self.k_quantizer)
        return self.attend(q @ k.transpose(-2, -1) * self.scale, v, x, attn_mask, is_causal=is_causal)

    def _heads(self, t: Tensor, norm: nn.Module, quantizer: nn.Module) -> Tensor:
        """(B, N, h*d) to (B, h, N, d): normalised per head, then quantized with one scale per token, shared by the heads."""
        t = norm(t.unflatten(-1, (self.num_heads, -1))).flatten(-2)
        return quantizer(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class QkrAttention(_ScoredAttention):
    """Query-key reparameterization: score[n, m] = Xq[n] . Q(M_h Xq[m]) / sqrt(d) with the quantized M_h = Wq_h^T Wk_h.

    The four quantizers in front of a score are those of the input, of M, of the product (role `k`) and of the probabilities.

    Attributes:
        q_weight: Wq (h*d, C), rows grouped by head; k_weight likewise.
        q_bias: (h*d,) under `qk_bias=fold`, else None: the paper's code drops it, which changes the function.
        product_offset: (h*C,) learnable offset in front of the product's quantizer: a bias of the folded linear map.
    """

    def __init__(self, attention: timm_layers.Attention, context: SwapContext) -> None:
        super().__init__(attention, context)
        wq, wk, wv = attention.qkv.weight.detach().clone().chunk(3)
        bq, _, bv = (None, None, None) if attention.qkv.bias is None else attention.qkv.bias.detach().clone().chunk(3)
        self.q_weight, self.k_weight = nn.Parameter(wq), nn.Parameter(wk)
        self.v = nn.Linear(wv.shape[1], wv.shape[0], bias=bv is not None, device="meta")
        self.v.weight = nn.Parameter(wv)
        if bv is not None:
            self.v.bias = nn.Parameter(bv)
        keep_bias = bq is not None and context.recipe.qk_bias == "fold"
        self.q_bias = nn.Parameter(bq) if bq is not None and keep_bias else None
        self.input_quantizer = context.act("input")
        self.qk_quantizer = context.weight("qk")
        self.k_quantizer = context.product()
        offsets = context.recipe.offsets and context.recipe.act_quantizer != "float"
        self.product_offset = nn.Parameter(wq.new_zeros(self.num_heads * wq.shape[1])) if offsets else None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # noqa: FBT001, FBT002  (timm's signature)
        """Map (B, N, C) to (B, N, C_out)."""
        xq = self.input_quantizer(x)
        scores = self._scores(xq) * self.scale
        return self.attend(scores, self.v(xq), x, attn_mask, is_causal=is_causal)

    def latent(self, role: str) -> Tensor:
        """The folded matrix M (h*C, C) for `qk`."""
        if role != "qk":
            raise KeyError(role)
        return fold_qk(self.q_weight, self.k_weight, self.num_heads)

    def _scores(self, xq: Tensor) -> Tensor:
        """Unscaled scores (B, h, N, N) of the quantized input (B, N, C)."""
        product = F.linear(xq, self.qk_quantizer(self.latent("qk")), self.product_offset)
        # One step per (token, head): index token*h + head.
        keys = self.k_quantizer(product.unflatten(-1, (self.num_heads, -1)).flatten(1, 2))
        keys = keys.unflatten(1, (-1, self.num_heads)).permute(0, 2, 3, 1)
        scores = torch.matmul(xq.unsqueeze(1), keys)
        if self.q_bias is None:
            return scores
        per_key = F.linear(xq, fold_q_bias(self.k_weight, self.q_bias, self.num_heads))
        return scores + per_key.transpose(1, 2).unsqueeze(2)


@register_swap(timm_layers.Attention, "attention")
def swap_attention(module: nn.Module, context: SwapContext) -> Swap:
    """Standard attention."""
    assert isinstance(module, timm_layers.Attention)  # noqa: S101  (narrows a type)
    return Swap(QuantAttention(module, context))


@register_swap(timm_layers.Attention, "qkr_attention")
def swap_qkr_attention(module: nn.Module, context: SwapContext) -> Swap:
    """Query-key reparameterization; the input of `v` is quantized already.

    Raises:
        UsageError: queries or keys are normalised, so that no single matrix M exists.
    """
    assert isinstance(module, timm_layers.Attention)  # noqa: S101  (narrows a type)
    if not (isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity)):
        raise UsageError(
            "quant.attention='qkr': this net normalises queries and keys, so Wq^T Wk is not its score; allowed here are standard, float"
        )
    return Swap(QkrAttention(module, context), {"v": "quantized"})
