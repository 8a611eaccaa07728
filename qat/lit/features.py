"""What modules of a net give in its own passes: blocks, for a loss that compares a student's with its teacher's; a teacher's head."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.blocks import find_blocks
from qat.utils.probing import probing


class Outputs:
    """Remembers what modules give in the passes inside `of_pass`.

    Args:
        modules: watched from now on.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._is_open = False
        self._seen: list[Tensor] = []
        for module in modules:
            module.register_forward_hook(self._see)

    @classmethod
    def of_blocks(cls, net: nn.Module, which: str = "all") -> Outputs:
        """Of `all` blocks of a net or the `last`."""
        return cls(_blocks(net, which))

    def __deepcopy__(self, memo: dict[int, object]) -> Outputs:
        """The same one: a copy of the net (averaged weights) is not trained."""
        return self

    def _see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._is_open:
            self._seen.append(output)

    @contextmanager
    def of_pass(self) -> Generator[list[Tensor]]:
        """What the pass inside gives: filled in the order in which the modules run, in the graph of the pass."""
        self._is_open = True
        try:
            yield self._seen
        finally:
            # What a module gives while it is made again for a backward pass is nothing new.
            self._is_open, self._seen = False, []


def compare_blocks(student: nn.Module, teacher: nn.Module, image: Tensor, setting: str, which: str = "all") -> None:
    """Run an image through both nets and compare what their blocks give.

    Args:
        student: on the device of `image`; nothing in it changes.
        teacher: on the device of `image`; nothing in it changes.
        image: (1, C, H, W).
        setting: that asks for it, as `loss.features=1`.
        which: blocks.

    Raises:
        UsageError: the net has no blocks, or those of the teacher give something else.
    """
    shapes: list[list[tuple[int, ...]]] = []
    for net in (student, teacher):
        found: list[tuple[int, ...]] = []
        hooks = [
            block.register_forward_hook(lambda _, args, out, found=found: found.append(tuple(getattr(out, "shape", ())[1:])))
            for block in _blocks(net, which)
        ]
        with probing(net, hooks):
            net(image)
        shapes.append(found)
    own, followed = shapes
    if not own or () in own:
        raise UsageError(f"{setting}: this net has no blocks (children of a module called blocks) that give one tensor each; must be 0")
    if own != followed:
        raise UsageError(f"{setting}: blocks give {own}, the teacher's {followed}; the teacher has to be of the same architecture")


def _blocks(net: nn.Module, which: str) -> list[nn.Module]:
    blocks = list(find_blocks(net).values())
    return blocks[-1:] if which == "last" else blocks
