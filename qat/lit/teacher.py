"""A frozen net whose logits a student follows, and what modules of a net give in its own passes: blocks, for a loss; a teacher's head."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.lit.compiled import CompiledCall
from qat.model.sites import find_blocks
from qat.nn.quant_module import keep_weights
from qat.utils.validate import check_choice


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
    def of_blocks(cls, net: nn.Module, which: str | None) -> Outputs:
        """Of `all` blocks of a net, the `last`, or none."""
        blocks = list(find_blocks(net).values()) if which else []
        return cls(blocks[-1:] if which == "last" else blocks)

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


class Teacher:
    """A net in eval mode, outside optimizer and checkpoint. Not a module on purpose: nothing registers its weights.

    Args:
        net: the float net; its parameters are frozen.
        head: `cls` = the class head alone, which the paper's code uses; `mean` = the net's own evaluation, for a distilled net the
            mean of both heads. The same for a net with one head.
    """

    def __init__(self, net: nn.Module, head: str = "cls") -> None:
        check_choice("loss.teacher_head", head, ("cls", "mean"))
        self.net = net.eval().requires_grad_(requires_grad=False)
        keep_weights(net, keep=True)  # a quantized teacher's never change
        self.head = head
        self._answer: Callable[[Tensor], Tensor] = net
        self._outputs: dict[str | None, Outputs] = {}
        # Which features its head gets is the net's own affair: a token in a distilled DeiT, their mean in LeViT.
        self._class_head = Outputs([net.head] if self.is_one_of_two else [])  # type: ignore[list-item]

    def __deepcopy__(self, memo: dict[int, object]) -> Teacher:
        """The same teacher: it never changes, and a copy of a module that holds it (averaged weights) need not hold another."""
        return self

    @property
    def is_one_of_two(self) -> bool:
        """True if the student follows one head of a net that has two."""
        return self.head == "cls" and hasattr(self.net, "head_dist")

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Teacher:
        """Move the net in place; of another dtype where one is given."""
        self.net.to(device, dtype)
        return self

    def compile(self, *, graphs: bool = False) -> None:
        """Compile the way from images to logits; see `CompiledCall`."""
        self._answer = CompiledCall(self.net, self.net, graphs=graphs)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self._logits(images)

    @torch.no_grad()
    def with_features(self, images: Tensor, which: str | None) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, K) of images (B, C, H, W), and what `all` blocks, the `last` or none give."""
        if which not in self._outputs:
            self._outputs[which] = Outputs.of_blocks(self.net, which)
        with self._outputs[which].of_pass() as features:
            return self._logits(images), features

    def _logits(self, images: Tensor) -> Tensor:
        with self._class_head.of_pass() as found:
            logits: Tensor = self._answer(images)
        return found[0] if found else logits
