"""Terms that are added to attention scores: biases by relative position, and window masks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qat.nn.swap_registry import SwapContext


class RelativeBias(nn.Module):
    """timm's table of biases, one for each head and relative position.

    This is a mixin: list it before the attention class. In some BEiTs, both attributes are None.

    Attributes:
        relative_position_bias_table: (relative positions, h).
        relative_position_index: (N, N), the row of the table for each query and key. timm computes
            this buffer, and checkpoints do not store it.
    """

    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.register_buffer(
            "relative_position_index", attention.relative_position_index, persistent=False
        )

    def position_bias(self) -> Tensor:
        """The bias (h, N, N) to add to scaled scores."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


def add_window_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Mask scores between parts of a window that are adjacent only because of a cyclic shift.

    Args:
        scores: (B*windows, h, N, N).
        mask: (windows, N, N), with 0 or -100 for each score; None without a shift.
    """
    if mask is None:
        return scores
    return (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
