"""How a net runs, which changes no result: what is kept for backward, and for the next forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from torch import nn

from qat.nn.attention import ScoredAttention
from qat.nn.quant_module import QuantModule
from qat.utils.validate import check_choice

MEMORY = ("save", "recompute")


def set_execution(net: nn.Module, *, memory: str = "save") -> nn.Module:
    """Choose between time and memory.

    Args:
        net: a converted net; another one stays as it is.
        memory: `save` keeps the probabilities of quantized attentions for backward; `recompute` makes them again from queries and
            keys, in less memory and a few percent more time. In compiled nets the compiler decides what is kept.

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


def keep_weights(net: nn.Module, *, keep: bool) -> None:
    """Begin to keep quantized weights from one forward pass to the next, or give them back and stop.

    A weight that was changed since is quantized anew, if torch knows of the change: one through `.data`, by a fused optimizer or by a
    collective operation has to be followed by another call.
    """
    for module in net.modules():
        if isinstance(module, QuantModule):
            module.kept_weights = {} if keep else None


@contextlib.contextmanager
def kept_weights(net: nn.Module) -> Generator[None]:
    """Keep quantized weights inside the block, in which they do not change."""
    keep_weights(net, keep=True)
    try:
        yield
    finally:
        keep_weights(net, keep=False)
