"""Distribution of weights over their codes, and how many codes weights and activations use."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from qat.analysis.analysis import (
    GREY,
    PALETTE,
    Analysis,
    Drawing,
    ImageSet,
    Outcome,
    Row,
    StudiedNet,
    Table,
    panels,
)
from qat.functional.kurtosis import kurtosis
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import Quantizer
from qat.utils.probing import probing
from qat.utils.validate import FLOAT_BITS

# Layer, role (`weight`, or `qk` for the folded matrix of QKR), latent float tensor (out, ...), and
# its quantizer, or None for a float weight.
LatentWeight = tuple[str, str, Tensor, Quantizer | None]
BINS = 96
MAX_PANELS = 9
ACTIVATION_IMAGES = 128
# A weight at most this many codes from a threshold counts as near, as in OFQ's annealing (CGA).
BOUNDARY = 0.005
# Levels and thresholds are drawn only for grids with at most this number of levels.
MAX_LEVELS = 20


@dataclass(frozen=True)
class WeightAnalysis(Analysis):
    """Histograms of weights before rounding, their kurtosis, and use of codes.

    The use of codes by activations is measured on up to 128 images.
    """

    name: ClassVar[str] = "weights"
    split: ClassVar[str | None] = "train"

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Compute tables of weights and activation quantizers, and histograms for each model."""
        summary = {}
        weight_table = []
        activation_table = []
        drawings = []
        for number, studied_net in enumerate(nets, start=1):
            label = studied_net.label
            weights = list(iter_latent_weights(studied_net.net))
            rows = [weight_row(*weight) for weight in weights]
            summary[label] = _summarize(rows)
            for row in rows:
                weight_table.append({"net": label, **row})
            if images.batches:
                for row in activation_rows(studied_net.net, _spread(images)):
                    activation_table.append({"net": label, **row})
            # At most `MAX_PANELS` weights, evenly spaced in the list, get a panel.
            stride = math.ceil(len(rows) / MAX_PANELS)
            panel_weights = list(zip(weights, rows, strict=True))[::stride]
            file = "weights_histograms"
            title = "Weights before rounding"
            if len(nets) > 1:
                file = f"{file}_{number}"
                title = f"Weights of {label} before rounding"
            drawings.append(_draw_histograms(file, title, panel_weights))
        tables = [
            Table("weights", "Weights and their codes", weight_table),
            Table("weights_activations", "Activation quantizers", activation_table),
        ]
        return Outcome(summary, [table for table in tables if table.rows], drawings)


@torch.no_grad()
def weight_row(layer: str, role: str, weight: Tensor, quantizer: Quantizer | None) -> Row:
    """Statistics of one tensor; for the arguments see `LatentWeight`."""
    weight = weight.float()
    row: Row = {
        "layer": layer,
        "role": role,
        "quantizer": "float" if quantizer is None else quantizer.spec.quantizer,
        "bits": FLOAT_BITS if quantizer is None else quantizer.spec.bits,
        "weights": weight.numel(),
        "kurtosis": float(kurtosis(weight)),
    }
    if quantizer is None:
        return row
    grid = quantizer.grid(weight)
    unrounded = weight if grid is None else grid.shift(weight)
    error = unrounded - quantizer(weight).float()
    row |= code_use(quantizer, weight)
    row["SNR (dB)"] = 10 * float((unrounded.square().sum() / error.square().sum()).log10())
    if grid is not None:
        is_near = grid.near_threshold(weight, BOUNDARY)
        row["near a threshold, %"] = 100 * float(is_near.float().mean())
    return row


def iter_latent_weights(net: nn.Module) -> Iterator[LatentWeight]:
    """Weights of linear layers and convolutions, and folded QKR matrices, in module order."""
    sites: dict[str, list[Site]] = defaultdict(list)
    for site in iter_quantizers(net):
        if site.is_weight:
            sites[site.layer].append(site)
    for name, module in net.named_modules():
        for site in sites[name]:
            quantizer = None if site.quantizer.is_float else site.quantizer
            yield name, site.role, site.latent().detach(), quantizer
        if not sites[name] and isinstance(module, nn.Linear | nn.Conv2d):
            yield name, "weight", module.weight.detach(), None


@torch.no_grad()
def code_use(quantizer: Quantizer, x: Tensor) -> Row:
    """Number of unused levels, and percentage of values at the end codes (lowest and highest).

    If the quantizer has a grid, the row also has the percentage of clipped values: values more than
    half a code beyond the end codes.
    """
    grid = quantizer.grid(x)
    codes = quantizer.codes(x)
    if grid is None:
        low = quantizer.spec.qmin
        high = quantizer.spec.qmax
    else:
        codes = grid.to_sorted_index(codes)
        low = grid.qmin
        high = grid.qmax
    # The quantizer of a user may return codes outside its bounds; they count as end codes.
    indices = codes.flatten().long().clamp(low, high) - low
    fractions = torch.bincount(indices, minlength=high - low + 1) / indices.numel()
    row: Row = {
        "unused levels": int((fractions == 0).sum()),
        "at the end codes, %": 100 * float(fractions[0] + fractions[-1]),
    }
    if grid is not None:
        coordinates = grid.to_code_coordinates(x)
        is_clipped = (coordinates < low - 0.5) | (coordinates > high + 0.5)
        row["clipped, %"] = 100 * float(is_clipped.float().mean())
    return row


def activation_rows(net: nn.Module, images: Tensor) -> list[Row]:
    """Measure the value range and the code use of activation quantizers on images (B, C, H, W).

    Returns:
        A row for the last call of each quantizer that ran, in the order of first calls.
    """
    rows: dict[str, Row] = {}

    def record(site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float()
        row: Row = {
            "quantizer of": site.name,
            "role": site.role,
            "quantizer": site.quantizer.spec.quantizer,
            "bits": site.quantizer.spec.bits,
            "values from": float(x.min()),
            "values to": float(x.max()),
        }
        rows[site.name] = row | code_use(site.quantizer, x)

    hooks = []
    for site in iter_quantizers(net):
        if not site.is_weight and not site.quantizer.is_float:
            hook = functools.partial(record, site)
            hooks.append(site.quantizer.register_forward_pre_hook(hook))
    with probing(net, hooks):
        net(images)
    return list(rows.values())


def _summarize(rows: Sequence[Row]) -> Row:
    quantized_rows = [row for row in rows if row["bits"] < FLOAT_BITS]
    return {
        "weights": sum(row["weights"] for row in rows),
        "quantized_weights": sum(row["weights"] for row in quantized_rows),
        "kurtosis_highest": max(row["kurtosis"] for row in rows),
        "clipped_percent": _weighted_mean(quantized_rows, "clipped, %"),
        "near_threshold_percent": _weighted_mean(quantized_rows, "near a threshold, %"),
    }


def _spread(images: ImageSet) -> Tensor:
    """Up to 128 images (B, C, H, W), evenly spaced, because those of a class may be adjacent."""
    batch = torch.cat([batch for batch, _ in images.batches])
    count = min(ACTIVATION_IMAGES, len(batch))
    return batch[[i * len(batch) // count for i in range(count)]]


def _weighted_mean(rows: Sequence[Row], column: str) -> float:
    """Mean of a column over all weights in the rows that have the column; NaN if none has it."""
    weighted_sum = 0
    num_weights = 0
    for row in rows:
        if column in row:
            weighted_sum += row[column] * row["weights"]
            num_weights += row["weights"]
    return weighted_sum / num_weights if num_weights else math.nan


def _draw_histograms(file: str, title: str, weights: Sequence[tuple[LatentWeight, Row]]) -> Drawing:
    """Draw a panel with a histogram for each tensor."""
    num_columns = min(3, len(weights))
    num_rows = math.ceil(len(weights) / num_columns)
    figure, axes = panels(num_rows, num_columns, height=0.5 + 1.75 * num_rows)
    descriptions = []
    for panel, ((layer, role, weight, quantizer), row) in zip(axes, weights, strict=False):
        name = layer if role == "weight" else f"{layer} ({role})"
        statistics = f"kurtosis {row['kurtosis']:.2f}"
        if quantizer is not None:
            statistics += f", {row['bits']} bit, SNR {row['SNR (dB)']:.1f} dB"
        descriptions.append(f"{name}: {statistics}")
        panel.set_title(f"{name[-34:]}\n{statistics}", fontsize=7, loc="left")
        panel.grid(visible=False)
        _draw_histogram(panel, weight.float(), quantizer)
    for panel in axes[len(weights) :]:
        panel.remove()
    figure.supylabel("weights, %", fontsize=9)
    caption = (
        "Histograms of float weights; with codes, dots are the levels and dashed lines the "
        "thresholds"
    )
    return Drawing(file, title, f"{caption}. {'; '.join(descriptions)}.", figure)


def _draw_histogram(panel: Axes, weight: Tensor, quantizer: Quantizer | None) -> None:
    """Draw one panel; the outermost bins include all weights beyond them."""
    grid = None if quantizer is None else quantizer.grid(weight)
    if grid is None:
        xlabel = "standard deviations"
        values = (weight - weight.mean()) / weight.std().clamp(min=1e-30)
        low = -6.0
        high = 6.0
    else:
        xlabel = "code"
        values = grid.to_code_coordinates(weight)
        low = grid.qmin - 1.5
        high = grid.qmax + 1.5
        levels = range(grid.qmin, grid.qmax + 1)
        if len(levels) <= MAX_LEVELS:
            _draw_levels(panel, levels)
        else:
            # With so many levels, most may be unused, so draw only the range of the weights.
            low = max(low, float(values.min()) - 0.5)
            high = min(high, float(values.max()) + 0.5)
    counts = torch.histc(values.clamp(low, high), bins=BINS, min=low, max=high)
    percents = 100 * counts / values.numel()
    edges = torch.linspace(low, high, BINS + 1)
    panel.stairs(percents.cpu(), edges, fill=True, color=PALETTE[0], alpha=0.75)
    panel.set_xlabel(xlabel, fontsize=7, labelpad=1)
    panel.set(xlim=(low, high), ylim=(0, None))


def _draw_levels(panel: Axes, levels: Sequence[int]) -> None:
    """Draw levels as dots, and thresholds as dashed lines."""
    thresholds = [level - 0.5 for level in levels[1:]]
    transform = panel.get_xaxis_transform()
    panel.vlines(thresholds, 0, 1, GREY, "--", linewidth=0.7, transform=transform)
    panel.plot(
        levels,
        [0] * len(levels),
        "o",
        color=PALETTE[1],
        markersize=3.5,
        clip_on=False,
        zorder=5,
    )
