"""Quantized attention with query-key reparameterization. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.functional.qkr import fold_q_bias, fold_qk
from qat.kernels.fused import QkrQuantizers, QkrWeights, Scoring, can_fuse, qkr_attention
from qat.nn.attention import ScoredAttention, join_separate_bias
from qat.nn.fusing import activation_params, is_inactive, weight_params
from qat.nn.linear import QuantLinear
from qat.nn.quant_module import QuantModule, is_hooked
from qat.nn.swap_registry import SwapContext


def _parameter_like(source: Tensor, values: Tensor) -> nn.Parameter:
    """A copy of `values` as a parameter, with the `requires_grad` of `source`."""
    return nn.Parameter(values.clone(), requires_grad=source.requires_grad)


class QkrAttention(ScoredAttention, QuantModule):
    """Attention with query-key reparameterization (QKR).

    Without biases, scores are Xq[n] . Q(M_h Xq[m]), with the quantized input Xq and the quantized
    M_h = Wq_h^T Wk_h. The quantizer Q of the product has the role `k`.

    Args:
        attention: the timm module, with its weights in `qkv`.
        context: recipe and place of the attention.

    Attributes:
        q_weight: Wq (h*d, C), rows grouped by head; None once M is frozen.
        k_weight: Wk (h*d, C), like `q_weight`.
        q_bias: (h*d,), the query bias, or None; kept only with `qk_bias=fold`. The paper's code
            drops the query bias, and this changes the result. The key bias is always dropped,
            because it does not change a softmax.
        folded_bias: (h, C), the folded query bias in a frozen model, or None.
        product_offset: (h*C,), learned offset before the quantizer of the product, or None; it is a
            bias of the folded linear map.
    """

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__(attention, context)
        qkv = attention.qkv
        has_separate_bias = hasattr(attention, "q_bias")
        bias = join_separate_bias(attention) if has_separate_bias else qkv.bias
        wq, wk, wv = qkv.weight.detach().chunk(3)
        self.q_weight = _parameter_like(qkv.weight, wq)
        self.k_weight = _parameter_like(qkv.weight, wk)
        self.v = nn.Linear(wv.shape[1], wv.shape[0], bias=bias is not None, device="meta")
        self.v.weight = _parameter_like(qkv.weight, wv)
        self.q_bias = None
        if bias is not None:
            q_bias, _, v_bias = bias.detach().chunk(3)
            self.v.bias = _parameter_like(getattr(attention, "v_bias", qkv.bias), v_bias)
            if context.recipe.qk_bias == "fold":
                self.q_bias = _parameter_like(getattr(attention, "q_bias", qkv.bias), q_bias)
        self.register_buffer("folded_bias", None)
        self.input_quantizer = context.act("input")
        self.qk_quantizer = context.weight("qk")
        self.k_quantizer = context.product_quantizer()
        self.product_offset = None
        if context.recipe.offsets and context.recipe.act_quantizer != "float":
            self.product_offset = nn.Parameter(wq.new_zeros(self.num_heads * wq.shape[1]))

    def latent(self, role: str) -> Tensor:
        """The folded matrix M (h*C, C), for the role `qk`."""
        if role != "qk":
            raise KeyError(role)
        return fold_qk(self.q_weight, self.k_weight, self.num_heads)

    def scores(self, xq: Tensor) -> Tensor:
        """Unscaled scores (B, h, N, N) of the quantized input (B, N, C)."""
        product = F.linear(xq, _cast_like(xq, self.quantized_weight("qk")), self.product_offset)
        # If step sizes differ by token and head, the index of a step size is token*h + head.
        keys = self.k_quantizer(product.unflatten(-1, (self.num_heads, -1)).flatten(1, 2))
        keys = keys.unflatten(1, (-1, self.num_heads)).permute(0, 2, 3, 1)
        scores = torch.matmul(xq.unsqueeze(1), keys)
        per_key = self.per_key_weight()
        if per_key is None:
            return scores
        return scores + F.linear(xq, _cast_like(xq, per_key)).transpose(1, 2).unsqueeze(2)

    def per_key_weight(self) -> Tensor | None:
        """The folded query bias c (h, C), which adds c_h . Xq[m] to the scores of key m.

        Returns None without a query bias.
        """
        if self.folded_bias is not None or self.q_bias is None:
            return self.folded_bias
        return fold_q_bias(self.k_weight, self.q_bias, self.num_heads)

    def fold_bias(self) -> None:
        """Store the result of `per_key_weight` in `folded_bias`."""
        self.folded_bias = self.per_key_weight()

    def compute_fused(
        self, x: Tensor, factor: float, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | None:
        """Compute `weigh_values(scores(xq) * factor + bias + mask, v(xq))` in one Function.

        Args:
            x: (B, N, C), not yet quantized.
            factor: factor on the scores.
            bias: (h, N, N) or None.
            mask: (W, N, N) for the W windows of an image, or None.

        Returns:
            (B, N, h*d); None if these operations cannot be fused.
        """
        v = self.v
        if not isinstance(v, QuantLinear) or is_hooked(v) or not is_inactive(v.input_quantizer):
            return None
        if not is_inactive(self.attn_drop) or not can_fuse(x):
            return None
        matrix_params = weight_params(self, "qk")
        v_params = weight_params(v, "weight")
        if matrix_params is None or v_params is None:
            return None
        quantizers = self._quantizer_params()
        if quantizers is None:
            return None
        # Without gradients, only the cached quantized matrix is read, so there is no need to fold.
        matrix = matrix_params.cached
        if matrix is None or torch.is_grad_enabled():
            matrix = self.latent("qk")
        weights = QkrWeights(matrix, v.weight, v.bias, self.product_offset, self.per_key_weight())
        scoring = Scoring(bias, mask, self.num_heads, factor, self.save_probs)
        return qkr_attention(x, weights, (matrix_params, v_params), quantizers, scoring)

    def _quantizer_params(self) -> QkrQuantizers | None:
        """LSQ parameters of the activation quantizers.

        Returns None if one of the quantizers cannot be fused.
        """
        x = activation_params(self.input_quantizer)
        product = activation_params(self.k_quantizer)
        values = activation_params(self.v_quantizer)
        probs = activation_params(self.probs_quantizer)
        if x is None or product is None or values is None or probs is None:
            return None
        return QkrQuantizers(input=x, product=product, values=values, probs=probs)

    def timm_weights(self) -> dict[str, Tensor]:
        """Weight and bias, if any, of timm's `qkv`, detached, by their names in timm's module.

        The key bias and a dropped query bias are zero.
        """
        weight = torch.cat([self.q_weight, self.k_weight, self.v.weight])
        state = {"qkv.weight": weight.detach()}
        if self.v.bias is not None:
            bias = torch.cat([self._query_bias(), torch.zeros_like(self.v.bias), self.v.bias])
            state["qkv.bias"] = bias.detach()
        return state

    def _query_bias(self) -> Tensor:
        return torch.zeros_like(self.v.bias) if self.q_bias is None else self.q_bias


def _cast_like(x: Tensor, weight: Tensor) -> Tensor:
    """Convert a folded weight to the dtype of `x`; operands of an exported graph stay unchanged."""
    if isinstance(weight, Tensor) and isinstance(x, Tensor):
        return weight.to(x.dtype)
    return weight
