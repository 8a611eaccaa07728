"""A frozen net whose outputs a student learns from, and a recorder of module outputs."""

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


class OutputRecorder:
    """Records the outputs of modules in forward passes inside `record_pass`.

    Args:
        modules: the modules, which stay hooked.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._is_open = False
        self._outputs: list[Tensor] = []
        for module in modules:
            module.register_forward_hook(self._record)

    @classmethod
    def for_blocks(cls, net: nn.Module, selection: str | None) -> OutputRecorder:
        """Build a recorder of `all` blocks of a net, of the `last` block, or (None) of no block."""
        blocks = list(find_blocks(net).values()) if selection else []
        if selection == "last":
            blocks = blocks[-1:]
        return cls(blocks)

    def __deepcopy__(self, memo: dict[int, object]) -> OutputRecorder:
        """Return the same object: copies of a net, such as averaged weights, need no recorder."""
        return self

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._is_open:
            # Some blocks of Transformers return a tuple that starts with the hidden states.
            self._outputs.append(output[0] if isinstance(output, tuple) else output)

    @contextmanager
    def record_pass(self) -> Generator[list[Tensor]]:
        """Yield a list to which a pass in the `with` block adds outputs, in order of computation.

        The outputs are not detached.
        """
        self._is_open = True
        try:
            yield self._outputs
        finally:
            # Outputs that are recomputed for a backward pass are not recorded.
            self._is_open = False
            self._outputs = []


class Teacher:
    """A frozen net in eval mode, which neither the optimizer nor checkpoints contain.

    This class is not a module; otherwise, a module with a teacher would register these weights.

    Args:
        net: the net, float or quantized; its parameters are frozen.
        head: `cls` = only the class head, as in OFQ's code; `mean` = the net's own
            evaluation, which is the mean of both heads in a distilled net. For a net with one head,
            both values mean the same.
    """

    def __init__(self, net: nn.Module, head: str = "cls") -> None:
        check_choice("loss.teacher_head", head, ("cls", "mean"))
        self.net = net.eval().requires_grad_(requires_grad=False)
        keep_weights(net, keep=True)  # quantized weights of a teacher never change
        self.head = head
        self._predict: Callable[[Tensor], Tensor] = net
        self._outputs: dict[str | None, OutputRecorder] = {}
        # The class head's logits are recorded in a forward pass of the net, because the net itself
        # chooses the features of this head: a token in a distilled DeiT, the mean of tokens in
        # LeViT.
        recorded_heads = [net.head] if self.uses_one_of_two_heads else []
        self._class_head_recorder = OutputRecorder(recorded_heads)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, object]) -> Teacher:
        """Return the same object: a teacher never changes, so copies of a module can share it."""
        return self

    @property
    def uses_one_of_two_heads(self) -> bool:
        """True if the student learns from one head of a net that has two."""
        return self.head == "cls" and hasattr(self.net, "head_dist")

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Teacher:
        """Move the net in place, and convert it to `dtype` unless `dtype` is None."""
        self.net.to(device, dtype)
        return self

    def compile(self, *, cuda_graphs: bool = False) -> None:
        """Compile the computation from images to logits; see `CompiledCall`."""
        self._predict = CompiledCall(self.net, self.net, cuda_graphs=cuda_graphs)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self._logits(images)

    @torch.no_grad()
    def with_features(self, images: Tensor, selection: str | None) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, K) of images (B, C, H, W), and outputs as in `OutputRecorder.for_blocks`."""
        if selection not in self._outputs:
            self._outputs[selection] = OutputRecorder.for_blocks(self.net, selection)
        with self._outputs[selection].record_pass() as features:
            return self._logits(images), features

    def _logits(self, images: Tensor) -> Tensor:
        with self._class_head_recorder.record_pass() as class_logits:
            logits: Tensor = self._predict(images)
        return class_logits[0] if class_logits else logits
