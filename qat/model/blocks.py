"""The blocks of a net: where post-training search and distillation divide it."""

from __future__ import annotations

from torch import nn

CONTAINER, DOWNSAMPLE, ATTENTION = "blocks", "downsample", "attn"


def find_blocks(net: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a net by name, in the order of its modules: children of a module called `blocks`, as timm calls it, the outermost.

    So is a `downsample` that has an attention (LeViT).
    """
    found: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        parent, _, own = name.rpartition(".")
        attends = any(child.startswith(ATTENTION) for child, _ in module.named_children())
        is_block = parent.rpartition(".")[2] == CONTAINER or (own == DOWNSAMPLE and attends)
        if is_block and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found
