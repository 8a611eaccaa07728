"""How a net runs, which changes no result: what is kept for backward."""

from __future__ import annotations

from torch import nn

from qat.nn.attention import ScoredAttention
from qat.spec import check_choice

MEMORY = ("save", "recompute")


def set_execution(net: nn.Module, *, memory: str = "save") -> nn.Module:
    """Choose between time and memory.

    Args:
        net: a converted net; another one stays as it is.
        memory: `save` keeps the probabilities of quantized attentions for backward; `recompute` makes them again from queries and
            keys, in less memory and a few percent more time. Not for compiled nets, whose compiler decides itself.

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
