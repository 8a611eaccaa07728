"""Names of torchvision's Swin, which the code of the OFQ paper uses too, and timm's names for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

# Only a Swin has a table of biases under this name.
_MARK = "features.1.0.attn.relative_position_bias_table"


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of torchvision's Swin as in timm; any other state dict is unchanged."""
    if _MARK not in state:
        return dict(state)
    renamed = {}
    for name, tensor in state.items():
        # timm computes these indices.
        if not name.endswith("relative_position_index"):
            renamed[_timm_name(name)] = tensor
    return renamed


def _timm_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _stage(match: re.Match[str]) -> str:
    """The stage of a feature: 1 is the first stage, 2 is the merging before the second, and so on."""
    index = int(match[1])
    part = "blocks" if index % 2 else "downsample"
    return f"layers.{index // 2}.{part}."


_NAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.(\d+)\.", _stage),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
)
