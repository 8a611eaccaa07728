"""Quantized standard attention, and code that it shares with query-key reparameterization (QKR).

Source: OFQ, arXiv 2302.02210.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels.fused import Scoring, attention, can_fuse, probs_dtype
from qat.nn.fusing import activation_params, is_inactive
from qat.nn.swap_registry import SwapContext
from qat.utils.validate import check_choice


def split_heads(t: Tensor, num_heads: int) -> Tensor:
    """Reshape (B, N, h*d) to (B, h, N, d)."""
    return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_separate_bias(attention: Any) -> Tensor | None:
    """Join `q_bias` and `v_bias` to a bias (3*h*d,), 0 for keys. Returns None if one is None."""
    q_bias = attention.q_bias
    v_bias = attention.v_bias
    if q_bias is None or v_bias is None:
        return None
    return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])


def quantize_heads(t: Tensor, quantizer: nn.Module) -> Tensor:
    """Quantize (B, h, N, d) as (B, N, h*d), or in its own shape if the scales belong to blocks.

    A score sums over d, so blocks along d must not extend across heads.
    """
    if getattr(quantizer, "in_blocks", False):
        return quantizer(t)
    return split_heads(quantizer(t.transpose(1, 2).flatten(2)), t.shape[1])


class ScoredAttention(nn.Module):
    """The part of attention after the scores, which standard attention and QKR share.

    Args:
        attention: the timm module, whose settings and output layers are used.
        context: recipe and place of the attention.

    Attributes:
        save_probs: True = save the probabilities for backward; see `Scoring`.
    """

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.scale: float = getattr(attention, "scale", 1.0)  # cosine attention learns its scale
        if hasattr(attention, "head_dim"):
            self.head_dim: int = attention.head_dim
        else:
            self.head_dim = attention.proj.in_features // attention.num_heads
        self.heads_per_group: int = getattr(attention, "num_kv_groups", 1)
        self.v_quantizer = context.act("v")
        self.probs_quantizer = context.act("probs")
        self.attn_drop = getattr(attention, "attn_drop", nn.Identity())
        self.norm = getattr(attention, "norm", nn.Identity())
        self.gate = getattr(attention, "gate", None)
        self.proj = attention.proj
        self.proj_drop = attention.proj_drop
        self.save_probs = True

    def weigh_values(self, scores: Tensor, v: Tensor) -> Tensor:
        """The sum of the quantized values, weighted by the quantized probabilities.

        Args:
            scores: (B, h, N, M), scaled, biased and masked.
            v: (B, M, h*d), not yet quantized; with fewer heads if groups of heads share values.

        Returns:
            (B, N, h*d).
        """
        probs = self.probs_quantizer(scores.softmax(dim=-1, dtype=probs_dtype(scores)))
        probs = self.attn_drop(probs)
        values = self.repeat_groups(split_heads(self.v_quantizer(v), v.shape[-1] // self.head_dim))
        return (probs @ values).transpose(1, 2).flatten(2)

    def attend(self, scores: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Apply `weigh_values`, then `project`; the result is (B, N, C_out)."""
        return self.project(self.weigh_values(scores, v), x)

    def project(self, out: Tensor, x: Tensor) -> Tensor:
        """Apply norm, gate, projection and dropout to the output of the heads.

        Args:
            out: (B, N, h*d).
            x: (B, N, C), the input of the attention, which only a gate reads.

        Returns:
            (B, N, C_out).
        """
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def repeat_groups(self, t: Tensor) -> Tensor:
        """Repeat keys or values (B, h/g, M, d), which groups of g heads share, to (B, h, M, d)."""
        return t if self.heads_per_group == 1 else t.repeat_interleave(self.heads_per_group, dim=1)

    def num_scores(self, x: Tensor) -> int:
        """Number of scores for an input (B, N, C); in window attention, B counts windows."""
        return x.shape[0] * self.num_heads * x.shape[1] ** 2


class QuantAttention(ScoredAttention):
    """Attention with quantized q, k, v and probabilities; children keep timm's names.

    Subclasses for families of models add `forward`.

    Attributes:
        qkv: timm's Linear; None in a family with separate Linears for q, k and v.
        q_bias: (h*d,), bias of the queries in a family whose biases are not part of `qkv`, or None.
        v_bias: (h*d,), bias of the values in such a family, or None.
    """

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.q_norm = getattr(attention, "q_norm", nn.Identity())
        self.k_norm = getattr(attention, "k_norm", nn.Identity())
        self.q_quantizer = context.act("q")
        self.k_quantizer = context.act("k")
        self.qkv: Any = getattr(attention, "qkv", None)
        self.q_bias = getattr(attention, "q_bias", None)
        self.v_bias = getattr(attention, "v_bias", None)

    def project_qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, N, h*d) of x (B, N, C), with separate biases added."""
        qkv = self.qkv(x)
        bias = join_separate_bias(self)
        if bias is not None:
            qkv = qkv + bias
        return qkv.chunk(3, dim=-1)

    def to_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Reshape queries and keys (B, N, h*d) to (B, h, N, d) and normalize them.

        Keys have fewer heads if groups of heads share keys.
        """
        q_heads = split_heads(q, self.num_heads)
        k_heads = split_heads(k, self.num_heads // self.heads_per_group)
        return self.q_norm(q_heads), self.k_norm(k_heads)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Unscaled scores (B, h, N, M) of q (B, h, N, d) and k (B, h/g, M, d).

        Each group of g query heads shares a head of keys; g is `heads_per_group`. If step sizes
        differ by token, all heads of a token share a step size.
        """
        q_q = quantize_heads(q, self.q_quantizer)
        k_q = self.repeat_groups(quantize_heads(k, self.k_quantizer))
        return q_q @ k_q.transpose(-2, -1)

    def compute_fused(
        self, qkv: Tensor, factor: float, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | None:
        """Compute `weigh_values(scores(q, k) * factor + bias + mask, v)` in one Function.

        Args:
            qkv: (B, N, 3*h*d).
            factor: factor on the scores.
            bias: (h, N, N) or None.
            mask: (W, N, N) for the W windows of an image, or None.

        Returns:
            (B, N, h*d); None if these operations cannot be fused.
        """
        if self.heads_per_group != 1 or not can_fuse(qkv):
            return None
        if not all(is_inactive(module) for module in (self.q_norm, self.k_norm, self.attn_drop)):
            return None
        q = activation_params(self.q_quantizer)
        k = activation_params(self.k_quantizer)
        v = activation_params(self.v_quantizer)
        probs = activation_params(self.probs_quantizer)
        if q is None or k is None or v is None or probs is None:
            return None
        scoring = Scoring(bias, mask, self.num_heads, factor, self.save_probs)
        return attention(qkv, (q, k, v, probs), scoring)


MEMORY = ("save", "recompute")


def set_execution(net: nn.Module, *, memory: str = "save") -> nn.Module:
    """Trade memory for time in backward; results stay the same.

    Args:
        net: a converted model; other models stay unchanged.
        memory: `save` = save the tensors that take long to compute. `recompute` = use less memory
            and up to 15 % more time: backward recomputes the probabilities of quantized attentions,
            and the products with the folded matrices of reparameterized attentions. `memory` has an
            effect only on attentions of ViT, DeiT and Swin that are computed as one Function (see
            `compute_fused`). In compiled models, the compiler decides what else to save.

    Returns:
        `net` itself.

    Raises:
        UsageError: `memory` is unknown.
    """
    check_choice("memory", memory, MEMORY)
    for module in net.modules():
        if isinstance(module, ScoredAttention):
            module.save_probs = memory == "save"
    return net
