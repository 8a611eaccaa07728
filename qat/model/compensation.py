"""A float matrix beside each block: y <- y + W x + b. Source: Quantization without Tears, arXiv 2411.13918."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.blocks import find_blocks
from qat.utils.probing import probing

COMPENSATION = "compensation"


class Compensation(nn.Linear):
    """W (C, C) and b (C,) of one block, zeros until they are fitted; no part of timm's net."""

    def reset_parameters(self) -> None:
        """Zeros: without effect."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def add_compensation(net: nn.Module, image: Tensor) -> None:
    """Give every block of a net a `Compensation` of its input (..., C), added to its output.

    Args:
        net: converted.
        image: (1, C, H, W).

    Raises:
        UsageError: no block gives back what has the shape of its input.
    """
    fitting: dict[nn.Module, Tensor] = {}

    def look(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, Tensor) and isinstance(args[0], Tensor) and args[0].shape == output.shape:
            fitting[block] = output

    blocks = find_blocks(net)
    with probing(net, [block.register_forward_hook(look) for block in blocks.values()]):
        net(image)
    tokens = {block: y for block, y in fitting.items() if not any(isinstance(m, nn.Conv2d) for m in block.modules())}
    if not tokens:
        raise UsageError("ptq.compensation='matrix': this net has no blocks that map tokens (..., C) to tokens; must be affine")
    for block, y in tokens.items():
        block.add_module(COMPENSATION, Compensation(y.shape[-1], y.shape[-1], device=y.device))
        block.register_forward_hook(_compensate)


def _compensate(block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    found: Tensor = output + block.get_submodule(COMPENSATION)(args[0])
    return found
