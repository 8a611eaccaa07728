"""Torchvision's Swin under timm's names: the published recipes start from its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

_MARK = "features.1.0.mlp.0.weight"


def _stage(found: re.Match[str]) -> str:
    """Stages and mergings are counted alike there: 1 = first stage, 2 = the merging before the second."""
    place = int(found[1])
    return f"layers.{place // 2}." + ("blocks." if place % 2 else "downsample.")


_NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.(\d+)\.", _stage),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
)


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names; a state dict of anything but torchvision's Swin comes back as it is."""
    if _MARK not in state:
        return dict(state)
    return {_renamed(name): tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}


def _renamed(name: str) -> str:
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name
