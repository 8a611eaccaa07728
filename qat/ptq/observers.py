"""What is remembered of a tensor while calibration images pass, and the scale at the end."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.functional.observers import RangeState, affine_from_state, observe, reaching_zero
from qat.ptq.distributed import Ranks
from qat.quantizers import Affine

# These try candidates on the last batch; the others need nothing but the range.
SEARCHING = ("omse", "mse", "ptf")
# These average over batches; the others remember the outermost ends.
MOVING = ("ema", "percentile")


class Observer(nn.Module):
    """Range of what one quantizer sees.

    Attributes:
        method: one of `qat.functional.observers.OBSERVERS`.
        axis: dimension that keeps ranges of its own, None = one for the tensor.
        low: (n,) one per scale, in the unit of the input; NaN until something was seen.
        high: (n,) one per scale, in the unit of the input; NaN until something was seen.
        seen: number of batches.

    Args:
        quantizer: has its shapes already.
    """

    def __init__(self, quantizer: Affine) -> None:
        super().__init__()
        self.method = quantizer.spec.observer or "minmax"
        self.axis = quantizer.axis
        self.bits, self.signed = quantizer.spec.bits, bool(quantizer.spec.signed)
        self.low: Tensor
        self.high: Tensor
        self.seen: Tensor
        self.register_buffer("low", torch.full_like(quantizer.scale, torch.nan))
        self.register_buffer("high", torch.full_like(quantizer.scale, torch.nan))
        self.register_buffer("seen", torch.zeros((), device=quantizer.scale.device))

    @property
    def searches(self) -> bool:
        """True if the scale depends on the last batch, not on the range alone."""
        return self.method in SEARCHING

    def update(self, x: Tensor) -> None:
        """Take in one batch, any shape."""
        state = observe(RangeState(self.low, self.high) if self.seen else None, x, self.axis, self.method)
        self.low.copy_(state.low)
        self.high.copy_(state.high)
        self.seen += 1

    def join(self, ranks: Ranks) -> None:
        """Make one range of those of all processes: the outermost ends, or their mean weighted by the number of batches."""
        if ranks.group is None:
            return
        mine = torch.stack([self.low, self.high, self.seen.expand_as(self.low)])
        all_of_them = [torch.empty_like(mine) for _ in range(ranks.world)]
        dist.all_gather(all_of_them, mine, group=ranks.group)
        self._take(torch.stack(all_of_them))

    def _take(self, gathered: Tensor) -> None:
        """Join (processes, 3, n): low, high, batches seen."""
        gathered = gathered[gathered[:, 2, 0] > 0]
        if not len(gathered):
            return  # whoever asks for a scale says so
        low, high, seen = gathered.unbind(1)
        if self.method in MOVING:
            share = seen / seen.sum(0)
            low, high = (low * share).sum(0, keepdim=True), (high * share).sum(0, keepdim=True)
        self.low.copy_(low.amin(0))
        self.high.copy_(high.amax(0))
        self.seen.copy_(seen[:, 0].sum())

    def scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, (n,) each.

        Args:
            x: the last batch; only read where the observer `searches`.
        """
        state = reaching_zero(RangeState(self.low, self.high))
        return affine_from_state(state, x, self.bits, signed=self.signed, axis=self.axis, method=self.method)
