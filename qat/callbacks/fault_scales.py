"""Step sizes that no longer quantize: not finite, exploded, collapsed, or at zero for good."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.functional.lsq import SCALE_FLOOR, relative_step
from qat.model.sites import iter_quantizers
from qat.quantizers import LSQ
from qat.utils.shards import whole
from qat.utils.validate import check_int, check_number


class ScaleWatch:
    """Compares learned step sizes with what they were when first seen.

    A step has exploded if it is not finite, or more than `max_change` times as large as at first (all codes are zero). It is dead if it was
    zero, negative or below 1/`max_change` of what it was (everything is clipped) for `dead_steps` steps: one that an optimizer has just
    pushed below zero mostly comes back by itself.

    Absolute steps (`quant.steps=absolute`; relative ones stay above zero): in 950 updates of 2-bit OFQ on digits from a trained net
    (`experiment=demo_ofq_2bit`) no step grew to more than 2.6 times its start;
    2 of 620 were at zero or below, for 1 and 11 steps on end. At three times that learning rate: 5.1 times, and 10 steps, for 1 to 82
    steps on end. From random weights, where attention begins with outputs and steps of 2e-4, the first updates of AdamW at 1e-3 push
    all steps in front of some `attn.proj` below zero, and in half of the blocks they stay there for as long as was looked (190 steps).

    A step that began at LSQ's floor or below (that of a position which is always padding) may stay there.

    Args:
        max_change: above 1.
        dead_steps: optimizer steps.

    Attributes:
        EXPLODED: what `look` calls a step size that has exploded.
        DEAD: what `look` calls one that is dead.
        starts: the step sizes of each quantizer when first seen, float32, by the name of its site.

    Raises:
        UsageError: one of the settings is out of range.
    """

    DEAD, EXPLODED = 1, 2

    def __init__(self, max_change: float, dead_steps: int) -> None:
        check_number("callbacks.finite.max_scale_change", max_change, 1, above=True)
        check_int("callbacks.finite.dead_steps", dead_steps, 1)
        self.max_change, self.dead_steps = float(max_change), dead_steps
        self.starts: dict[str, Tensor] = {}
        self._steps: list[tuple[str, LSQ]] = []

    def attach(self, net: nn.Module) -> None:
        """Find the learned steps of a net; those that `starts` does not know are first seen now."""
        self._steps = [
            (site.name, module)
            for site in iter_quantizers(net)
            for module in site.quantizer.modules()
            if isinstance(module, LSQ) and (module.change is not None or module.scale is not None)
        ]
        now = {name: _step_of(quantizer) for name, quantizer in self._steps}
        # Those of a checkpoint come on the CPU.
        self.starts = {name: self.starts[name].to(step.device) if name in self.starts else step.to(copy=True) for name, step in now.items()}
        if not self._steps:
            return
        starts = list(self.starts.values())
        start = torch.cat([one.flatten() for one in starts])
        sizes = torch.tensor([one.numel() for one in starts], device=start.device)
        self._owner = torch.arange(len(starts), device=start.device).repeat_interleave(sizes)
        largest = torch.cat([one.max().expand(one.numel()) for one in starts])
        began = start > SCALE_FLOOR
        self._low = torch.where(began, start / self.max_change, -torch.inf)
        units = torch.tensor([quantizer.unit for _, quantizer in self._steps], device=start.device).repeat_interleave(sizes)
        self._high = torch.where(began, start.maximum(units), largest) * self.max_change
        self._high = torch.where(largest > SCALE_FLOOR, self._high, torch.finfo(start.dtype).max)
        self._since = torch.full_like(start, torch.inf)

    @torch.no_grad()
    def look(self, step: int) -> Tensor:
        """Look behind an optimizer step.

        Returns:
            `EXPLODED`, else `DEAD`, else 0; where the first such step is among all; its value: (3,) float32, on the net's device.
        """
        if not self._steps:
            return torch.zeros(3)
        sizes = torch.cat([_step_of(quantizer) for _, quantizer in self._steps])
        is_low = sizes < self._low
        self._since = torch.where(is_low, self._since.clamp(max=step), torch.inf)
        is_dead = is_low & (step - self._since >= self.dead_steps)
        found = torch.where(sizes.abs() <= self._high, is_dead * self.DEAD, self.EXPLODED)  # NaN compares as false
        first = found.argmax()
        return torch.stack([found[first].float(), first.float(), sizes[first]])

    def forget(self, index: int) -> None:
        """Speak no more of steps below their limit of the quantizer of a finding."""
        self._low[self._owner == self._owner[index]] = -torch.inf

    def describe(self, index: int, value: float) -> str:
        """A finding of `look` in words: quantizer, value, entry, value at the start."""
        for name, start in self.starts.items():
            if index < start.numel():
                entry = f" (entry {index} of {start.numel()})" if start.numel() > 1 else ""
                return f"the step size of {name} is {value:g}{entry}, it began at {float(start.flatten()[index]):g}"
            index -= start.numel()
        raise IndexError(index)


@torch.no_grad()
def _step_of(quantizer: LSQ) -> Tensor:
    """The step in force, (n,) float32."""
    if quantizer.change is None:
        return whole(quantizer.scale).float().flatten()
    return relative_step(whole(quantizer.start), whole(quantizer.change), quantizer.unit).float().flatten()
