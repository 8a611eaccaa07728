"""What the weights of a net look like, and what their quantizers make of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.functional.kurtosis import kurtosis
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import Grid, Quantizer, UniformGrid
from qat.utils.validate import FLOAT_BITS

# A channel whose largest weight is below this share of the median channel's is dead.
DEAD = 1e-3
# Of a float weight, in standard deviations; what lies outside is counted in the outermost bins.
_FLOAT_RANGE = 6.0
_BINS = 96
# Codes beyond the outermost ones that a histogram shows.
_MARGIN = 1.5


@dataclass(frozen=True)
class Master:
    """One float weight tensor.

    Attributes:
        layer: path of its module.
        role: `weight`, or `qk` (the folded matrix).
        weight: (out, ...), detached.
        quantizer: None for a tensor that is not quantized.
    """

    layer: str
    role: str
    weight: Tensor
    quantizer: Quantizer | None


@dataclass(frozen=True)
class Histogram:
    """Share of weights in bins of equal width.

    Attributes:
        low: lower end of the first bin: in codes, or in standard deviations of a tensor without codes.
        high: upper end of the last bin.
        share: of each bin, (n,); the outermost ones hold what lies outside as well.
    """

    low: float
    high: float
    share: Sequence[float]


@dataclass(frozen=True)
class Codes:
    """What a quantizer makes of a weight. Shares are between 0 and 1.

    Attributes:
        low: lowest code.
        usage: share of weights at each code from `low` on.
        entropy: of the usage, in bits; up to the width.
        snr: ratio of the squared weights to the squared error, in dB.
        error: mean |w - w_q| in steps; NaN where the step is not known.
        beyond: share beyond the outermost levels.
        clipped: share beyond them by more than half a step, which rounding would not explain.
        near: share within the boundary of a threshold between two codes that occur.
        step: smallest, median and largest distance of neighbouring levels over the channels.
    """

    low: int
    usage: Sequence[float]
    entropy: float
    snr: float
    error: float
    beyond: float
    clipped: float
    near: float
    step: tuple[float, float, float]

    @property
    def unused(self) -> int:
        """Number of levels that no weight is at."""
        return sum(share == 0 for share in self.usage)

    @property
    def at_ends(self) -> float:
        """Share of weights at the lowest and the highest code."""
        return self.usage[0] + self.usage[-1]


@dataclass(frozen=True)
class WeightStats:
    """One weight tensor.

    Attributes:
        layer: path of its module.
        role: see `Master`.
        quantizer: name of it; `float` for none.
        bits: of a code; 32 for float.
        n_weights: elements.
        channels: rows.
        dead: rows without a weight to speak of, or with all weights at one level.
        spread: largest minus smallest weight.
        kurtosis: of all elements, std with n - 1: 1.8 uniform, 3 normal. 0 for a constant tensor.
        codes: None for a tensor without codes.
        histogram: of the float weights.
    """

    layer: str
    role: str
    quantizer: str
    bits: int
    n_weights: int
    channels: int
    dead: int
    spread: float
    kurtosis: float
    codes: Codes | None
    histogram: Histogram

    @property
    def title(self) -> str:
        """The layer, and the role where it has several."""
        return self.layer if self.role == "weight" else f"{self.layer} ({self.role})"


def masters(net: nn.Module) -> Iterator[Master]:
    """Every weight of a Linear or convolution, every folded matrix, in the order of the modules."""
    found: dict[str, list[Site]] = defaultdict(list)
    for site in iter_quantizers(net):
        if site.is_weight:
            found[site.layer].append(site)
    for name, module in net.named_modules():
        for site in found.get(name, ()):
            yield Master(name, site.role, site.latent().detach(), None if site.quantizer.is_float else site.quantizer)
        if name not in found and isinstance(module, nn.Linear | nn.Conv2d):
            yield Master(name, "weight", module.weight.detach(), None)


@torch.no_grad()
def weight_stats(master: Master, boundary: float) -> WeightStats:
    """Look at one tensor.

    Args:
        master: the tensor.
        boundary: half-width of the band around thresholds, in codes.
    """
    weight, quantizer = master.weight.float(), master.quantizer
    grid = None if quantizer is None else quantizer.grid(weight)
    rounded = None if quantizer is None else quantizer(weight).float()
    low, high = weight.aminmax()
    return WeightStats(
        layer=master.layer,
        role=master.role,
        quantizer="float" if quantizer is None else quantizer.spec.quantizer,
        bits=FLOAT_BITS if quantizer is None else quantizer.spec.bits,
        n_weights=weight.numel(),
        channels=weight.shape[0],
        dead=_dead(weight, rounded),
        spread=float(high - low),
        kurtosis=float(kurtosis(weight)),
        codes=None if quantizer is None or rounded is None else _codes(quantizer, weight, rounded, grid, boundary),
        histogram=_histogram(weight, grid),
    )


def _dead(weight: Tensor, rounded: Tensor | None) -> int:
    largest = weight.flatten(1).abs().amax(1)
    dead = largest < DEAD * largest.median()
    dead |= largest == 0
    if rounded is not None and rounded[0].numel() > 1:
        lowest, highest = rounded.flatten(1).aminmax(dim=1)
        dead |= lowest == highest
    return int(dead.sum())


def _codes(quantizer: Quantizer, weight: Tensor, rounded: Tensor, grid: Grid | None, boundary: float) -> Codes:
    low, high = (quantizer.spec.qmin, quantizer.spec.qmax) if grid is None else (grid.qmin, grid.qmax)
    usage, lowest = code_usage(quantizer.codes(weight), low, high)
    error = (weight - rounded).abs()
    signal, noise = float(weight.square().sum()), float(error.square().sum())
    z = torch.full_like(weight, torch.nan) if grid is None else grid.to_code_coordinates(weight)
    step = grid.along(weight.ndim)[0] if isinstance(grid, UniformGrid) else weight.new_full((), torch.nan)
    return Codes(
        low=lowest,
        usage=usage,
        entropy=entropy(usage),
        snr=10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf if signal > 0 else math.nan,
        error=float((error / step).nanmean()),
        beyond=math.nan if grid is None else _share((z < low) | (z > high)),
        clipped=math.nan if grid is None else _share((z < low - 0.5) | (z > high + 0.5)),
        near=math.nan if grid is None else _share(grid.near_threshold(weight, boundary)),
        step=spread_of(step),
    )


def code_usage(codes: Tensor, low: int, high: int) -> tuple[list[float], int]:
    """Share of each code, and the lowest one; codes outside the bounds widen them."""
    lowest, highest = (int(end) for end in codes.aminmax())
    low, high = min(low, lowest), max(high, highest)
    counts = torch.bincount((codes.flatten().int() - low), minlength=high - low + 1)
    return (counts / codes.numel()).tolist(), low


def entropy(usage: Sequence[float]) -> float:
    """In bits."""
    return sum(-share * math.log2(share) for share in usage if share > 0)


def spread_of(values: Tensor) -> tuple[float, float, float]:
    """Smallest, median and largest."""
    flat = values.detach().float().flatten()
    return float(flat.amin()), float(flat.median()), float(flat.amax())


def _share(mask: Tensor) -> float:
    return float(mask.sum()) / mask.numel()


def _histogram(weight: Tensor, grid: Grid | None) -> Histogram:
    if grid is not None:
        values, low, high = grid.to_code_coordinates(weight), grid.qmin - _MARGIN, grid.qmax + _MARGIN
        # Of 256 codes most may be empty: only the part that is occupied is worth its place.
        lowest, highest = (float(end) for end in values.aminmax())
        low, high = max(low, math.floor(lowest) - 0.5), min(high, math.ceil(highest) + 0.5)
    else:
        std = weight.std().clamp(min=torch.finfo(torch.float32).tiny) if weight.numel() > 1 else weight.new_ones(())
        values, low, high = (weight - weight.mean()) / std, -_FLOAT_RANGE, _FLOAT_RANGE
    low, high = (low, high) if low < high else (low - 0.5, low + 0.5)
    counts = torch.histc(values.clamp(low, high), bins=_BINS, min=low, max=high)
    return Histogram(low, high, (counts / weight.numel()).tolist())
