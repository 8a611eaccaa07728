"""A frozen net whose logits a student follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.lit.compiled import CompiledCall
from qat.lit.features import Outputs
from qat.nn.execution import keep_weights
from qat.utils.validate import check_choice

HEADS = ("cls", "mean")


class Teacher:
    """A net in eval mode, outside optimizer and checkpoint. Not a module on purpose: nothing registers its weights.

    Args:
        net: the float net; its parameters are frozen.
        head: `cls` = the class head alone, which the paper's code uses; `mean` = the net's own evaluation, for a distilled net the
            mean of both heads. The same for a net with one head.
    """

    def __init__(self, net: nn.Module, head: str = "cls") -> None:
        check_choice("loss.teacher_head", head, HEADS)
        self.net = net.eval().requires_grad_(requires_grad=False)
        keep_weights(net, keep=True)  # a quantized teacher's never change
        self.head = head
        self._answer: Callable[[Tensor], Tensor] = net
        self._outputs: dict[str, Outputs] = {}
        # Which features its head gets is the net's own affair: a token in a distilled DeiT, their mean in LeViT.
        self._class_head = Outputs([net.head]) if self.is_one_of_two else None  # type: ignore[list-item]

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

    def compile(self) -> None:
        """Compile the way from images to logits; see `CompiledCall`."""
        self._answer = CompiledCall(self.net, self.net)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self._logits(images)

    @torch.no_grad()
    def with_features(self, images: Tensor, which: str) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, K) of images (B, C, H, W), and what `all` blocks or the `last` give."""
        if which not in self._outputs:
            self._outputs[which] = Outputs.of_blocks(self.net, which)
        with self._outputs[which].of_pass() as features:
            return self._logits(images), features

    def _logits(self, images: Tensor) -> Tensor:
        if self._class_head is None:
            return self._answer(images)
        with self._class_head.of_pass() as found:
            self._answer(images)
        return found[0]
