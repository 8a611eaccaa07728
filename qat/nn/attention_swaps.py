"""Register how modules of an attention class are replaced by quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qat.errors import UsageError
from qat.nn.attention import QuantAttention
from qat.nn.qkr_attention import QkrAttention
from qat.nn.quant_module import is_hooked
from qat.nn.swap_registry import Swap, SwapContext, is_plain_layer, register_swap


def register_attention(
    cls: type[nn.Module],
    standard: type[QuantAttention],
    qkr: Callable[[Any, SwapContext], QkrAttention] | str,
    *,
    inputs: Mapping[str, str] | None = None,
    also_float: bool = False,
) -> None:
    """Register how modules of an attention class are replaced by quantized ones.

    Args:
        cls: an attention class of timm.
        standard: class of the quantized attention without query-key reparameterization.
        qkr: builds the quantized attention with query-key reparameterization (QKR); or the reason
            why `cls` cannot have QKR, as a text that continues "this model". An attention with
            norms of queries or keys, or with hooks or additional tensors in `qkv`, cannot either.
        inputs: input ranges (`SwapContext.input`) of the children of `standard`, by name.
        also_float: True = use `standard` for float attention too, because timm's class uses the
            weight of a quantized Linear without calling the Linear.
    """

    def swap_standard(module: nn.Module, context: SwapContext) -> Swap:
        return Swap(standard(module, context), inputs or {})

    def swap_qkr(module: Any, context: SwapContext) -> Swap:
        reason = _obstacle_to_qkr(module, qkr)
        if isinstance(qkr, str) or reason is not None:
            raise UsageError(f"quant.attention='qkr': {reason}; must be one of standard, float")
        return Swap(qkr(module, context), {"v": "quantized"})

    register_swap(cls, "attention")(swap_standard)
    if also_float:
        register_swap(cls, "float_attention")(swap_standard)
    register_swap(cls, "qkr_attention")(swap_qkr)


def _obstacle_to_qkr(module: Any, qkr: Callable[..., Any] | str) -> str | None:
    """The reason why a module cannot be reparameterized. Returns None if it can."""
    has_norms = False
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(module, name, None), nn.Identity | None):
            has_norms = True
    if isinstance(qkr, str) or has_norms:
        property_of_model = qkr if isinstance(qkr, str) else "normalizes queries and keys"
        return f"this model {property_of_model}, so its scores cannot be computed from Wq^T Wk"
    if is_plain_layer(module.qkv) and not is_hooked(module.qkv):
        return None
    return (
        f"this model's qkv, which would be split, is a {type(module.qkv).__name__} with hooks, or "
        "with more than a weight and a bias"
    )
