"""Biases that some checkpoints have and timm's models have not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def grow_biases(net: nn.Module, names: Iterable[str]) -> None:
    """Give linear layers a bias of zeros. `net.qat_biases` lists their names, for checkpoints.

    Args:
        net: a timm model, not yet converted.
        names: paths of linear layers, such as `layers.1.downsample.reduction`; those that have a
            bias already keep it.

    Raises:
        ValueError: one of them is not a linear layer.
    """
    modules = dict(net.named_modules())
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is not a linear layer")
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
            net.qat_biases = [*grown_biases(net), name]


def grown_biases(net: nn.Module) -> list[str]:
    """Names of the linear layers of `net` that `grow_biases` gave a bias."""
    return list(getattr(net, "qat_biases", []))
