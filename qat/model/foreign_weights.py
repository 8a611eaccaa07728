"""Adapt weights from other libraries: names as in timm, and biases that timm's models lack."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

# Torchvision's Swin has this table of biases; so do files of the OFQ paper's code, which use
# torchvision's names.
_SWIN_TABLE = "features.1.0.attn.relative_position_bias_table"


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of torchvision's Swin as in timm; leave any other state dict unchanged."""
    if _SWIN_TABLE not in state:
        return dict(state)
    renamed = {}
    for name, tensor in state.items():
        # timm computes these indices itself.
        if not name.endswith("relative_position_index"):
            renamed[_timm_name(name)] = tensor
    return renamed


def _timm_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _timm_stage(match: re.Match[str]) -> str:
    """Prefix in timm for `features.N`: N = 1 is stage 1, N = 2 the merging before stage 2."""
    index = int(match[1])
    part = "blocks" if index % 2 else "downsample"
    return f"layers.{index // 2}.{part}."


_RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.(\d+)\.", _timm_stage),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
)


def add_biases(net: nn.Module, names: Iterable[str]) -> None:
    """Add a bias of zeros to linear layers, and store the layers' names in `net.qat_biases`.

    Checkpoints contain these names, so that `load` can add the biases again.

    Args:
        net: a timm model, not yet converted.
        names: paths of linear layers, such as `layers.1.downsample.reduction`; layers that already
            have a bias keep it.

    Raises:
        ValueError: a path is not a linear layer.
    """
    modules = dict(net.named_modules())
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is not a linear layer")
        if linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
            net.qat_biases = [*added_biases(net), name]


def added_biases(net: nn.Module) -> list[str]:
    """Names of the linear layers to which `add_biases` added a bias."""
    return list(getattr(net, "qat_biases", []))
