"""Linears that have a bias although timm builds them without one: some checkpoints come with such biases."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def grow_biases(net: nn.Module, names: Iterable[str]) -> None:
    """Give Linears a bias of zeros, and note their names as `net.qat_biases` for the net's checkpoints.

    Args:
        net: a timm net, not yet converted.
        names: of Linears, `layers.1.downsample.reduction`; those that have a bias already stay as they are.

    Raises:
        ValueError: one of them is no Linear.
    """
    modules = dict(net.named_modules())
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is no Linear")
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
            net.qat_biases = [*grown_biases(net), name]


def grown_biases(net: nn.Module) -> list[str]:
    """Names of the Linears of `net` that `grow_biases` gave a bias."""
    found = getattr(net, "qat_biases", None)
    return list(found) if isinstance(found, list) else []


def invent_biases(net: nn.Module) -> list[str]:
    """Give Linears outside of attentions that have no bias one, at first as random as torch makes it: so does the reference's conversion.

    Returns:
        Their names.
    """
    names = [name for name, module in net.named_modules() if type(module) is nn.Linear and module.bias is None and ".attn." not in name]
    grow_biases(net, names)
    for name in names:
        linear = net.get_submodule(name)
        assert isinstance(linear, nn.Linear)  # noqa: S101  (narrows a type)
        nn.init.uniform_(linear.bias, -(linear.in_features**-0.5), linear.in_features**-0.5)
    return names
