"""What activation quantizers can represent, and what a few images make of their codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.analysis.weights.weight_stats import entropy, spread_of
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import Grid, Quantizer, UniformGrid
from qat.utils.probing import probing


@dataclass
class CodeCounts:
    """Of one quantizer, summed over batches.

    Attributes:
        counts: (levels,) int64, how often each code occurred.
        clipped: how many values lay beyond the outermost levels by more than half a step.
        lowest, highest: of the values.
    """

    counts: Tensor
    clipped: Tensor | None
    lowest: Tensor
    highest: Tensor

    @property
    def usage(self) -> list[float]:
        """Share of values at each code."""
        shares: list[float] = (self.counts / self.counts.sum()).tolist()
        return shares

    @property
    def clipped_share(self) -> float:
        """NaN where the axis of codes is not known."""
        return math.nan if self.clipped is None else float(self.clipped) / int(self.counts.sum())


@dataclass(frozen=True)
class ActivationStats:
    """One activation quantizer.

    Attributes:
        site: path of the quantizer.
        role: what it quantizes.
        quantizer: its name.
        bits: of a code.
        scales: number of them.
        step: smallest, median and largest; NaN where there is none that is stored.
        zero_point: smallest and largest; NaN without.
        before, after: largest magnitude of the learnable offsets in median steps; None without them.
        represents: lowest and highest input that some channel or token can represent; NaN where steps are read off each batch.
        seen: what images showed; None where none was looked at.
    """

    site: str
    role: str
    quantizer: str
    bits: int
    scales: int
    step: tuple[float, float, float]
    zero_point: tuple[float, float]
    before: float | None
    after: float | None
    represents: tuple[float, float]
    seen: CodeCounts | None = field(default=None, repr=False)


def activation_stats(net: nn.Module, seen: dict[str, CodeCounts]) -> list[ActivationStats]:
    """Every activation quantizer of a net, float ones left out.

    Args:
        net: converted or float.
        seen: of `look`, by site.
    """
    sites = [site for site in iter_quantizers(net) if not site.is_weight and not site.quantizer.is_float]
    return [_stats(site, seen.get(site.name)) for site in sites]


@torch.no_grad()
def _stats(site: Site, seen: CodeCounts | None) -> ActivationStats:
    quantizer, grid = site.quantizer, site.quantizer.grid()
    uniform = grid if isinstance(grid, UniformGrid) else None
    step = (math.nan,) * 3 if uniform is None else spread_of(uniform.step)
    zeros = uniform.zero_point if uniform is not None and isinstance(uniform.zero_point, Tensor) else None
    before, after = (None, None) if grid is None else (grid.before, grid.after)
    return ActivationStats(
        site=site.name,
        role=site.role,
        quantizer=quantizer.spec.quantizer,
        bits=quantizer.spec.bits,
        scales=quantizer.n_scales,
        step=(step[0], step[1], step[2]),
        zero_point=(math.nan, math.nan) if zeros is None else (float(zeros.min()), float(zeros.max())),
        before=_in_steps(before, step[1]),
        after=_in_steps(after, step[1]),
        represents=(math.nan, math.nan) if grid is None else _represented(grid),
        seen=seen,
    )


def _in_steps(offset: Tensor | None, step: float) -> float | None:
    if offset is None:
        return None
    largest = float(offset.abs().max())
    return largest / step if step > 0 else largest


def _represented(grid: Grid) -> tuple[float, float]:
    """The widest of what the slices represent: one with a larger step, or a channel with another offset, sees further."""
    lowest, highest = grid.ends()
    left, right = (0.0, 0.0) if grid.before is None else (float(grid.before.max()), float(grid.before.min()))
    return float(lowest.min()) - left, float(highest.max()) - right


def look(net: nn.Module, batches: Iterable[Tensor]) -> dict[str, CodeCounts]:
    """What each activation quantizer is given by some images, in one forward pass of each batch.

    Args:
        net: in any mode; left as it was.
        batches: images (B, C, H, W) each.
    """
    seen: dict[str, CodeCounts] = {}
    sites = [site for site in iter_quantizers(net) if not site.is_weight and not site.quantizer.is_float]
    with probing(net, [site.quantizer.register_forward_pre_hook(_watcher(site.name, seen)) for site in sites]):
        for images in batches:
            net(images)
    return seen


def _watcher(name: str, seen: dict[str, CodeCounts]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Quantizer)  # noqa: S101  (narrows a type)
        seen[name] = joined(seen.get(name), watched(module, args[0]))

    return hook


@torch.no_grad()
def watched(quantizer: Quantizer, x: Tensor) -> CodeCounts:
    """What one tensor shows."""
    grid = quantizer.grid(x)
    low, high = (quantizer.spec.qmin, quantizer.spec.qmax) if grid is None else (grid.qmin, grid.qmax)
    codes = quantizer.codes(x).flatten().int()
    z = None if grid is None else grid.to_code_coordinates(x)
    clipped = None if z is None else ((z < low - 0.5) | (z > high + 0.5)).sum()
    # A code outside the bounds, which a quantizer of the user's may have, counts as the outermost one.
    counts = torch.bincount((codes - low).clamp(0, high - low), minlength=high - low + 1)
    return CodeCounts(counts, clipped, *x.detach().float().aminmax())


def joined(before: CodeCounts | None, now: CodeCounts) -> CodeCounts:
    """Two batches as one."""
    if before is None:
        return now
    clipped = None if before.clipped is None or now.clipped is None else before.clipped + now.clipped
    lowest, highest = torch.minimum(before.lowest, now.lowest), torch.maximum(before.highest, now.highest)
    return CodeCounts(before.counts + now.counts, clipped, lowest, highest)


def unused_levels(usage: Sequence[float]) -> int:
    """Number of levels that nothing is at."""
    return sum(share == 0 for share in usage)


def activation_row(stats: ActivationStats) -> dict[str, str | int | float]:
    """One line of a table; what is not known is left out."""
    row: dict[str, str | int | float] = {
        "quantizer of": stats.site,
        "role": stats.role,
        "quantizer": stats.quantizer,
        "bits": stats.bits,
        "scales": stats.scales,
        "step, smallest": stats.step[0],
        "step, median": stats.step[1],
        "step, largest": stats.step[2],
        "zero point, smallest": stats.zero_point[0],
        "zero point, largest": stats.zero_point[1],
        "offset before, largest (steps)": math.nan if stats.before is None else stats.before,
        "offset after, largest (steps)": math.nan if stats.after is None else stats.after,
        "represents from": stats.represents[0],
        "represents to": stats.represents[1],
    }
    if stats.seen is not None:
        usage = stats.seen.usage
        row |= {
            "seen from": float(stats.seen.lowest),
            "seen to": float(stats.seen.highest),
            "unused levels": unused_levels(usage),
            "entropy (bits)": entropy(usage),
            "clipped, %": 100 * stats.seen.clipped_share,
            "at the end codes, %": 100 * (usage[0] + usage[-1]),
        }
    return readable(row)


def readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a table without what is not known, with six digits of what is no whole number."""
    known = {key: value for key, value in row.items() if not (isinstance(value, float) and math.isnan(value))}
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in known.items()}
