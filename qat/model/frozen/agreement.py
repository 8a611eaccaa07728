"""How far two forms of a net agree, and whether it is thresholds that part them: one rounding error on a threshold is another code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.model.frozen.quantizers import FrozenActivation
from qat.model.sites import iter_quantizers
from qat.utils.probing import probing

# A float32 value behind a few hundred terms is known to about this share of the largest value of its tensor.
ROUNDING = 2e-5


class QuantizerTrace(NamedTuple):
    """What a quantizer did.

    Attributes:
        value: what it was about to round, offset included.
        codes: what it made of that.
        in_codes: the value is in the unit of codes already.
    """

    value: Tensor
    codes: Tensor
    in_codes: bool = False


# Logits (B, classes), and what each quantizer did, by its name.
Watched = tuple[Tensor, dict[str, QuantizerTrace]]


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
        largest_absolute: the same in the unit of logits.
        largest_flipped: largest difference of logits among images with a flip, relative to the largest logit.
        not_ties: names of quantizers where codes first differed away from a threshold; empty if the nets are the same.
    """

    images: int = 0
    same_top1: int = 0
    without_flip: int = 0
    flipped: int = 0
    ties: int = 0
    largest: float = 0.0
    largest_absolute: float = 0.0
    largest_flipped: float = 0.0
    not_ties: list[str] = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Percent of the images on which both name the same class."""
        return 100 * self.same_top1 / max(self.images, 1)

    def add(self, other: Agreement) -> None:
        """Count further images in."""
        for name in ("images", "same_top1", "without_flip", "flipped", "ties", "not_ties"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("largest", "largest_absolute", "largest_flipped"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))

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
        found.add(compare(frozen, run_watched(net, x), run_watched(frozen, x)))
    return found


def compare(frozen: nn.Module, theirs: Watched, mine: Watched) -> Agreement:
    """Compare two runs on the same images.

    Args:
        frozen: has the grids of all quantizers.
        theirs: logits, and what arrived at each quantizer; see `run_watched`.
        mine: the same of the other form, in the order in which quantizers run.
    """
    (a, first), (b, second) = theirs, mine
    n, found = len(a), Agreement()
    grids = {site.name: site.quantizer for site in iter_quantizers(frozen)}
    flipped = torch.zeros(n, dtype=torch.bool, device=a.device)
    ties = torch.ones_like(flipped)
    for name, seen in second.items():
        grid, both = grids[name], (first[name], seen)
        if not isinstance(grid, FrozenActivation) or (len(seen.value) % n and len(seen.value) != 1):
            continue
        axis = dataclasses.replace(grid.grid(), before=None)  # values hold the offset in front already
        places = (one.value if one.in_codes else axis.to_code_coordinates(one.value) for one in both)
        u, v = (_by_image(place, n, (grid.qmin - 1, grid.qmax + 1)) for place in places)
        codes, others = (_by_image(one.codes.float(), n, (grid.qmin, grid.qmax)) for one in both)
        differs = codes != others
        here = differs.any(1) & ~flipped
        near = (u - v).abs() <= ROUNDING * (1 + max(abs(grid.qmin), abs(grid.qmax)))
        is_tie = (near | ~differs).all(1)
        found.not_ties += [name] * int((here & ~is_tie).sum())
        ties &= is_tie | ~here
        flipped |= here
    apart = (a - b).abs().amax(1)
    off = apart / a.abs().amax().clamp(min=1e-30)
    found.images += n
    found.same_top1 += int((a.argmax(1) == b.argmax(1)).sum())
    found.without_flip += int((~flipped).sum())
    found.flipped += int(flipped.sum())
    found.ties += int((flipped & ties).sum())
    found.largest, found.largest_absolute = (t[~flipped].max().item() if found.without_flip else 0.0 for t in (off, apart))
    found.largest_flipped = off[flipped].max().item() if found.flipped else 0.0
    return found


def _by_image(x: Tensor, n: int, ends: tuple[int, int]) -> Tensor:
    """(n, ...), cut off at the ends; what all images share, as an embedding of positions, is that of each."""
    return (x.expand(n, *x.shape[1:]) if len(x) == 1 else x).clamp(*ends).reshape(n, -1)


def run_watched(net: nn.Module, x: Tensor) -> Watched:
    """A net's logits, and what its activation quantizers see and give, in the order in which they run."""
    seen: dict[str, QuantizerTrace] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(module: Any, args: tuple[Tensor, ...]) -> None:
            grid = module.grid(args[0])
            seen[name] = QuantizerTrace(args[0].float() if grid is None else grid.shift(args[0]), module.codes(args[0]))

        return note

    sites = [site for site in iter_quantizers(net) if not site.is_weight and not site.quantizer.is_float]
    with probing(net, [site.quantizer.register_forward_pre_hook(hook(site.name)) for site in sites]):
        out: Tensor = net(x)
    return out, seen
