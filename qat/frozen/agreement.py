"""How far two forms of a net agree, and whether it is thresholds that part them: one rounding error on a threshold is another code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qat.frozen.quantizers import FrozenActivation
from qat.probing import probing
from qat.sites import iter_quantizers

# A float32 value behind a few hundred terms is known to about this share of the largest value of its tensor.
ROUNDING = 2e-5


@dataclass
class Agreement:
    """What two nets make of the same images.

    Attributes:
        images: how many.
        same_top1: images on which both name the same class.
        without_flip: images on which every code of every activation is the same.
        flipped: images on which some code differs.
        ties: those of them where the first codes that differ lie on a threshold, to rounding.
        largest: largest difference of logits among images without a flip, relative to the largest logit.
        largest_flipped: likewise among the others.
        not_ties: names of quantizers where codes first differed away from a threshold; empty if the nets are the same.
    """

    images: int = 0
    same_top1: int = 0
    without_flip: int = 0
    flipped: int = 0
    ties: int = 0
    largest: float = 0.0
    largest_flipped: float = 0.0
    not_ties: list[str] = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Percent of the images on which both name the same class."""
        return 100 * self.same_top1 / max(self.images, 1)

    def to_text(self) -> str:
        """Two lines."""
        return (
            f"top-1 agrees on {self.same_top1} of {self.images} images ({self.top1:.2f} %)\n"
            f"no code differs on {self.without_flip} (logits within {self.largest:.1e}); on {self.flipped} one does"
            f" (within {self.largest_flipped:.1e}), the first of them on a threshold in {self.ties}"
        )


@torch.no_grad()
def agreement(net: nn.Module, frozen: nn.Module, batches: Iterable[Tensor]) -> Agreement:
    """Compare a net with its frozen form.

    Args:
        net: quantized; evaluated as it trains.
        frozen: of `freeze`, in either mode.
        batches: images (B, C, H, W) each.
    """
    found = Agreement()
    for x in batches:
        _compare(net, frozen, x, found)
    return found


def _compare(net: nn.Module, frozen: nn.Module, x: Tensor, found: Agreement) -> None:
    a, first = _run(net, x)
    b, second = _run(frozen, x)
    grids = {site.name: site.quantizer for site in iter_quantizers(frozen)}
    flipped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    ties = torch.ones_like(flipped)
    for name, mine in second.items():
        grid, theirs = grids[name], first[name]
        if not isinstance(grid, FrozenActivation) or len(mine) % len(x):
            continue
        u, v = (grid.placed(t) for t in (theirs, mine))
        u, v = (t.clamp(grid.qmin - 1, grid.qmax + 1).reshape(len(x), -1) for t in (u, v))
        codes = [t.round().clamp(grid.qmin, grid.qmax) for t in (u, v)]
        differs = codes[0] != codes[1]
        here = differs.any(1) & ~flipped
        near = (u - v).abs() <= ROUNDING * (1 + max(abs(grid.qmin), abs(grid.qmax)))
        is_tie = (near | ~differs).all(1)
        found.not_ties += [name] * int((here & ~is_tie).sum())
        ties &= is_tie | ~here
        flipped |= here
    off = (a - b).abs().amax(1) / a.abs().amax().clamp(min=1e-30)
    found.images += len(x)
    found.same_top1 += int((a.argmax(1) == b.argmax(1)).sum())
    found.without_flip += int((~flipped).sum())
    found.flipped += int(flipped.sum())
    found.ties += int((flipped & ties).sum())
    found.largest = max(found.largest, off[~flipped].max().item() if (~flipped).any() else 0.0)
    found.largest_flipped = max(found.largest_flipped, off[flipped].max().item() if flipped.any() else 0.0)


def _run(net: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and what every activation quantizer is about to round, offset included, in the order in which they run."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            before = getattr(module, "offset_before", getattr(module, "before", None))
            seen[name] = args[0].float() if before is None else args[0].float() + before

        return note

    sites = [site for site in iter_quantizers(net) if not site.is_weight]
    with probing(net, [site.quantizer.register_forward_pre_hook(hook(site.name)) for site in sites]):
        out: Tensor = net(x)
    return out, seen
