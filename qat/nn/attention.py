"""What quantized attentions of all families share: standard, and with query-key reparameterization. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import UsageError
from qat.functional.qkr import fold_q_bias, fold_qk
from qat.kernels.fused import (
    QkrOperands,
    QkrWeights,
    Scoring,
    attention,
    can_fuse,
    probs_dtype,
    qkr_attention,
)
from qat.nn.fusing import is_off, operand_of, weight_params
from qat.nn.linear import QuantLinear
from qat.nn.quant_module import QuantModule, is_watched
from qat.nn.swap_registry import Swap, SwapContext, is_plain, register_swap
from qat.utils.validate import check_choice


def split_heads(t: Tensor, num_heads: int) -> Tensor:
    """(B, N, h*d) to (B, h, N, d)."""
    return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _bias_beside(attention: Any) -> Tensor | None:
    """(3*h*d,), zeros for keys, of modules that keep `q_bias` and `v_bias` beside their `qkv`; None where they have none."""
    q_bias, v_bias = attention.q_bias, attention.v_bias
    return (
        None
        if q_bias is None or v_bias is None
        else torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    )


def _learning_as(source: Tensor, t: Tensor) -> nn.Parameter:
    """`t` as a parameter that is frozen if `source` is."""
    return nn.Parameter(t, requires_grad=source.requires_grad)


def _quantized(t: Tensor, quantizer: nn.Module) -> Tensor:
    """Quantize (B, h, N, d) as (B, N, h*d), but as it is where blocks of values share scales: a score sums over d."""
    if getattr(quantizer, "in_blocks", False):
        return quantizer(t)
    return split_heads(quantizer(t.transpose(1, 2).flatten(2)), t.shape[1])


def add_window_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Keep windows that a cyclic shift put together from seeing across the seam.

    Args:
        scores: (B*windows, h, N, N).
        mask: (windows, N, N), 0 or -100, or None without a shift.
    """
    if mask is None:
        return scores
    return (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)


class ScoredAttention(nn.Module):
    """What both forms share: everything from the scores on.

    Args:
        attention: the timm module whose settings and output layers are taken over.
        context: recipe and place.

    Attributes:
        keep_probs: see `Scoring`.
    """

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.scale: float = getattr(attention, "scale", 1.0)  # cosine attention learns its own
        self.head_dim: int = (
            attention.head_dim
            if hasattr(attention, "head_dim")
            else attention.proj.in_features // attention.num_heads
        )
        self.groups: int = getattr(attention, "num_kv_groups", 1)
        self.v_quantizer = context.act("v")
        self.probs_quantizer = context.act("probs")
        self.attn_drop = getattr(attention, "attn_drop", nn.Identity())
        self.norm = getattr(attention, "norm", nn.Identity())
        self.gate = getattr(attention, "gate", None)
        self.proj = attention.proj
        self.proj_drop = attention.proj_drop
        self.keep_probs = True

    def gather(self, scores: Tensor, v: Tensor) -> Tensor:
        """Softmax, probabilities times values.

        Args:
            scores: (B, h, N, M), scaled, biased and masked.
            v: (B, M, h*d), not yet quantized; fewer heads where groups of heads share theirs.

        Returns:
            (B, N, h*d).
        """
        probs = self.attn_drop(
            self.probs_quantizer(scores.softmax(dim=-1, dtype=probs_dtype(scores)))
        )
        values = self.shared(split_heads(self.v_quantizer(v), v.shape[-1] // self.head_dim))
        return (probs @ values).transpose(1, 2).flatten(2)

    def attend(self, scores: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """`gather`, then norm, gate and projection: (B, N, C_out). Only a gate reads x (B, N, C), the input of the attention."""
        return self.project(self.gather(scores, v), x)

    def project(self, out: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and projection of what leaves the heads (B, N, h*d)."""
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def shared(self, t: Tensor) -> Tensor:
        """(B, h/groups, M, d) to (B, h, M, d): a group of query heads sees the same keys and values."""
        return t if self.groups == 1 else t.repeat_interleave(self.groups, dim=1)

    def n_scores(self, x: Tensor) -> int:
        """Number of scores that an input (B, N, C) leads to; B counts windows."""
        return x.shape[0] * self.num_heads * x.shape[1] ** 2


class QuantAttention(ScoredAttention):
    """Attention with quantized q, k, v and probabilities; a family adds `forward`. Keeps timm's names.

    Attributes:
        qkv: timm's; None in a family that has Linears of its own for q, k and v.
        q_bias: (h*d,), of families that keep biases beside `qkv`, else None.
        v_bias: the same of values.
    """

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.q_norm = getattr(attention, "q_norm", nn.Identity())
        self.k_norm = getattr(attention, "k_norm", nn.Identity())
        self.q_quantizer = context.act("q")
        self.k_quantizer = context.act("k")
        self.qkv: Any = getattr(attention, "qkv", None)
        self.q_bias, self.v_bias = (
            getattr(attention, "q_bias", None),
            getattr(attention, "v_bias", None),
        )

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, N, h*d) each, of x (B, N, C), with the biases beside `qkv`."""
        qkv, bias = self.qkv(x), _bias_beside(self)
        return (qkv if bias is None else qkv + bias).chunk(3, dim=-1)

    def heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, h*d) to (B, h, N, d), normalised; fewer heads of keys where groups of heads share theirs."""
        return self.q_norm(split_heads(q, self.num_heads)), self.k_norm(
            split_heads(k, self.num_heads // self.groups)
        )

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Unscaled scores (B, h, N, M) of q (B, h, N, d) and k (B, h, M, d), each with one step per token, shared by the heads."""
        return _quantized(q, self.q_quantizer) @ self.shared(
            _quantized(k, self.k_quantizer)
        ).transpose(-2, -1)

    def fused(
        self, qkv: Tensor, factor: float, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | None:
        """`gather(scores(q, k) * factor + bias + mask, v)` in one Function, None where it cannot be.

        Args:
            qkv: (B, N, 3*h*d).
            factor: of the scores.
            bias: (h, N, N) or None.
            mask: (W, N, N) for the W windows of an image, or None.
        """
        is_plain = self.groups == 1 and all(
            is_off(module) for module in (self.q_norm, self.k_norm, self.attn_drop)
        )
        if not (is_plain and can_fuse(qkv)):
            return None
        q, k, v, p = (
            operand_of(o)
            for o in (self.q_quantizer, self.k_quantizer, self.v_quantizer, self.probs_quantizer)
        )
        if q is None or k is None or v is None or p is None:
            return None
        return attention(
            qkv, (q, k, v, p), Scoring(bias, mask, self.num_heads, factor, self.keep_probs)
        )


class QkrAttention(ScoredAttention, QuantModule):
    """Query-key reparameterization: score[n, m] = Xq[n] . Q(M_h Xq[m]) with the quantized M_h = Wq_h^T Wk_h.

    The four quantizers before a score are those of the input, of M, of the product (role `k`) and of the probabilities.

    Args:
        attention: the timm module, with its weights in `qkv`.
        context: recipe and place.

    Attributes:
        q_weight: Wq (h*d, C), rows grouped by head.
        k_weight: Wk (h*d, C), rows grouped by head.
        q_bias: (h*d,) under `qk_bias=fold`, else None: the paper's code drops it, which changes the function. A key's is
            never kept: a softmax is blind to it.
        folded_bias: (h, C), what a frozen net keeps of the query bias.
        product_offset: (h*C,) learnable offset before the product's quantizer: a bias of the folded linear map.
    """

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__(attention, context)
        bias = _bias_beside(attention) if hasattr(attention, "q_bias") else attention.qkv.bias
        wq, wk, wv = (third.clone() for third in attention.qkv.weight.detach().chunk(3))
        bq, _, bv = (
            (None, None, None)
            if bias is None
            else (third.clone() for third in bias.detach().chunk(3))
        )
        of_q, of_v = (getattr(attention, name, attention.qkv.bias) for name in ("q_bias", "v_bias"))
        self.q_weight, self.k_weight = (_learning_as(attention.qkv.weight, w) for w in (wq, wk))
        self.v = nn.Linear(wv.shape[1], wv.shape[0], bias=bv is not None, device="meta")
        self.v.weight = _learning_as(attention.qkv.weight, wv)
        if bv is not None:
            self.v.bias = _learning_as(of_v, bv)
        self.q_bias = (
            _learning_as(of_q, bq) if bq is not None and context.recipe.qk_bias == "fold" else None
        )
        self.register_buffer("folded_bias", None)
        self.input_quantizer = context.act("input")
        self.qk_quantizer = context.weight("qk")
        self.k_quantizer = context.product()
        offsets = context.recipe.offsets and context.recipe.act_quantizer != "float"
        self.product_offset = (
            nn.Parameter(wq.new_zeros(self.num_heads * wq.shape[1])) if offsets else None
        )

    def latent(self, role: str) -> Tensor:
        """The folded matrix M (h*C, C) for `qk`."""
        if role != "qk":
            raise KeyError(role)
        return fold_qk(self.q_weight, self.k_weight, self.num_heads)

    def scores(self, xq: Tensor) -> Tensor:
        """Unscaled scores (B, h, N, N) of the quantized input (B, N, C)."""
        product = F.linear(xq, _of_dtype(self.quantized("qk"), xq), self.product_offset)
        # One step per (token, head): index token*h + head.
        keys = self.k_quantizer(product.unflatten(-1, (self.num_heads, -1)).flatten(1, 2))
        scores = torch.matmul(
            xq.unsqueeze(1), keys.unflatten(1, (-1, self.num_heads)).permute(0, 2, 3, 1)
        )
        per_key = self.per_key_weight()
        return (
            scores
            if per_key is None
            else scores + F.linear(xq, _of_dtype(per_key, xq)).transpose(1, 2).unsqueeze(2)
        )

    def per_key_weight(self) -> Tensor | None:
        """(h, C), which makes a score of each key alone: the query bias, folded; None without one."""
        if self.folded_bias is not None or self.q_bias is None:
            return self.folded_bias
        return fold_q_bias(self.k_weight, self.q_bias, self.num_heads)

    def fold_bias(self) -> None:
        """Keep what `per_key_weight` gives in place of what it is made from."""
        self.folded_bias = self.per_key_weight()

    def fused(
        self, x: Tensor, factor: float, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | None:
        """`gather(scores(xq) * factor + bias + mask, v(xq))` of the quantized x (B, N, C) in one Function, None where it cannot be."""
        v = self.v
        if not (isinstance(v, QuantLinear) and not is_watched(v) and is_off(v.input_quantizer)):
            return None
        if not (is_off(self.attn_drop) and can_fuse(x)):
            return None
        matrix, of_v = weight_params(self, "qk"), weight_params(v, "weight")
        if matrix is None or of_v is None:
            return None
        found = (
            operand_of(o)
            for o in (
                self.input_quantizer,
                self.k_quantizer,
                self.v_quantizer,
                self.probs_quantizer,
            )
        )
        operands = [o for o in found if o is not None]
        if len(operands) < 4:
            return None
        folded = (
            self.latent("qk") if matrix.cached is None or torch.is_grad_enabled() else matrix.cached
        )
        weights = QkrWeights(folded, v.weight, v.bias, self.product_offset, self.per_key_weight())
        scoring = Scoring(bias, mask, self.num_heads, factor, self.keep_probs)
        return qkr_attention(x, weights, (matrix, of_v), QkrOperands(*operands), scoring)

    def timm_weights(self) -> dict[str, Tensor]:
        """The attention's own tensors as timm's module keeps them, detached; those of `proj` and further children are not among them.

        A query bias that was dropped comes back as zeros, and so does the key bias.
        """
        state = {"qkv.weight": torch.cat([self.q_weight, self.k_weight, self.v.weight]).detach()}
        if self.v.bias is not None:
            state["qkv.bias"] = torch.cat([
                self._query_bias(),
                torch.zeros_like(self.v.bias),
                self.v.bias,
            ]).detach()
        return state

    def _query_bias(self) -> Tensor:
        return torch.zeros_like(self.v.bias) if self.q_bias is None else self.q_bias


def _of_dtype(weight: Tensor, x: Tensor) -> Tensor:
    """What was folded is float32 in a net of any dtype; codes stay codes."""
    return weight.to(x.dtype) if isinstance(weight, Tensor) and isinstance(x, Tensor) else weight


MEMORY = ("save", "recompute")


def set_execution(net: nn.Module, *, memory: str = "save") -> nn.Module:
    """Choose between time and memory, which changes no result.

    Args:
        net: a converted net; another one stays as it is.
        memory: `save` keeps for backward what takes long to make; `recompute` makes probabilities of quantized attentions again, and
            the products of reparameterized ones with their matrices, in less memory and up to 15 % more time. Of what compiled nets
            keep the compiler decides.

    Returns:
        `net` itself.

    Raises:
        UsageError: `memory` is neither.
    """
    check_choice("memory", memory, MEMORY)
    for module in net.modules():
        if isinstance(module, ScoredAttention):
            module.keep_probs = memory == "save"
    return net


class RelativeBias(nn.Module):
    """To be named before an attention: timm's table of biases, one per head and pair of relative positions, float.

    Attributes:
        relative_position_bias_table: (relative positions, h).
        relative_position_index: (N, N) rows of the table; made again by timm, not stored.
    """

    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.register_buffer(
            "relative_position_index", attention.relative_position_index, persistent=False
        )

    def position_bias(self) -> Tensor:
        """(h, N, N), to be added to scaled scores."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


def register_attention(
    cls: type[nn.Module],
    standard: type[QuantAttention],
    qkr: Callable[[Any, SwapContext], QkrAttention] | str,
    *,
    inputs: Mapping[str, str] | None = None,
    also_float: bool = False,
) -> None:
    """The swaps of an attention class.

    Args:
        cls: timm's.
        standard: its quantized form; takes the module and a `SwapContext`.
        qkr: its form with query-key reparameterization, which norms of queries or keys rule out, or why there is none: `this net <why>`.
        inputs: what children of the standard form receive.
        also_float: the standard form also takes the place where attention is float: timm's would go around a quantized Linear.
    """

    def swap_standard(module: nn.Module, context: SwapContext) -> Swap:
        return Swap(standard(module, context), inputs or {})

    def swap_qkr(module: Any, context: SwapContext) -> Swap:
        why = f"this model {qkr if isinstance(qkr, str) else 'normalises queries and keys'}, so Wq^T Wk is not its score"
        norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
        if not isinstance(qkr, str) and all(isinstance(norm, nn.Identity | None) for norm in norms):
            if is_plain(module.qkv) and not is_watched(module.qkv):
                return Swap(qkr(module, context), {"v": "quantized"})
            kind = type(module.qkv).__name__
            why = f"its qkv is a {kind} with more than a weight and a bias, or with hooks, and would be taken apart"
        raise UsageError(f"quant.attention='qkr': {why}; here it must be one of standard, float")

    for intent in ("attention", *(["float_attention"] if also_float else [])):
        register_swap(cls, intent)(swap_standard)
    register_swap(cls, "qkr_attention")(swap_qkr)
