"""Which parameters of a net weight decay leaves alone."""

from __future__ import annotations

from torch import nn

from qat.nn import QkrAttention
from qat.quantizers import Quantizer


def quantizer_parameters(net: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Step sizes, and offsets, of all quantizers of a net."""
    scales: set[nn.Parameter] = set()
    offsets: set[nn.Parameter] = set()
    for module in net.modules():
        if isinstance(module, Quantizer):
            for name, parameter in module.named_parameters(recurse=False):
                (offsets if name.startswith("offset") else scales).add(parameter)
        if isinstance(module, QkrAttention) and module.product_offset is not None:
            offsets.add(module.product_offset)
    return scales, offsets


def no_weight_decay(net: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone: steps and offsets of quantizers, biases, norms, and what timm names.

    A converted net says so itself (`net.no_weight_decay()`), which is where `timm.optim.create_optimizer_v2` and
    `param_groups_weight_decay` look. Source: OFQ's recipe skips decay for 1-D tensors, biases,
    position embedding and tokens, hence for scales and offsets.

    Args:
        net: converted or float.
    """
    found = dict(net.named_parameters())
    named = (_named_by_timm(net) & found.keys()) | {name for name, p in found.items() if p.ndim <= 1 or name.endswith(".bias")}
    quantizers = set.union(*quantizer_parameters(net))
    return named | {name for name, p in found.items() if p in quantizers}


def _named_by_timm(net: nn.Module) -> set[str]:
    """What the class of a net names; where it has no such method, as timm's wrappers of `features_only=True`, what its parts name."""
    own = getattr(type(net), "no_weight_decay", None)
    if own is not None:
        return set(own(net))
    return {f"{child_name}.{name}" for child_name, child in net.named_children() for name in _named_by_timm(child)}
