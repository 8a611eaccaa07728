"""What `reset_classifier` may have changed on a net of timm's, and its constructor does not say."""

from __future__ import annotations

from torch import nn

from qat.errors import UsageError


def check_head(net: nn.Module, num_classes: int) -> None:
    """Raise `UsageError` if the classifier has another number of outputs than the net says: a file would build another one."""
    head = net.get_classifier() if callable(getattr(net, "get_classifier", None)) else None  # type: ignore[operator]
    outputs = getattr(head, "out_features", num_classes)
    if outputs != num_classes:
        raise UsageError(f"save: the head has {outputs} outputs, num_classes={num_classes}; net.reset_classifier({outputs}) sets both")


def pooling_of(net: nn.Module) -> str | None:
    """How tokens become one vector, as `token` or `avg`; None where a module does it."""
    pool = getattr(net, "global_pool", None)
    return pool if isinstance(pool, str) else None


def set_pooling(net: nn.Module, pool: str | None) -> None:
    """Give a net that was built anew the pooling of the one that was saved; None of older files leaves its own."""
    if pool is not None and pooling_of(net) is not None:
        net.global_pool = pool  # type: ignore[assignment]
