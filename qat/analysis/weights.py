"""What weights look like on the axis of their codes, and how weights and activations use the range of their codes."""

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

# Layer, role (`weight`, or `qk` of a folded matrix), float tensor (out, ...), and its quantizer, None for one that is not quantized.
LatentWeight = tuple[str, str, Tensor, Quantizer | None]
BINS = 96
MOST_PANELS = 9
ACTIVATION_IMAGES = 128
# Half-width of the band in which a weight is near a threshold, in codes: that of CGA.
BOUNDARY = 0.005
# Of more levels the thresholds are not drawn.
MOST_LEVELS = 20


@dataclass(frozen=True)
class WeightAnalysis(Analysis):
    """Histograms of float weights on the axis of their codes, kurtosis, use of the range of codes; that of activations for 128 images."""

    name: ClassVar[str] = "weights"
    split: ClassVar[str | None] = "train"

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Tables of weights and of activation quantizers; histograms of each net."""
        summary, table, activations, drawings = {}, [], [], []
        for number, studied in enumerate(nets, 1):
            weights, label = list(latent_weights(studied.net)), studied.label
            rows = [weight_row(*weight) for weight in weights]
            summary[label] = _summary(rows)
            table += [{"net": label, **row} for row in rows]
            if images.batches:
                batch = torch.cat([batch for batch, _ in images.batches])[:ACTIVATION_IMAGES]
                activations += [
                    {"net": label, **row} for row in activation_rows(studied.net, batch)
                ]
            shown = [
                (weights[i], rows[i])
                for i in range(0, len(rows), math.ceil(len(rows) / MOST_PANELS))
            ]  # evenly spaced
            suffix, of_net = (f"_{number}", f" of {label}") if len(nets) > 1 else ("", "")
            drawings.append(
                _histograms(
                    f"weights_histograms{suffix}", f"Weights{of_net} before rounding", shown
                )
            )
        tables = [
            Table("weights", "Weights and their codes", table),
            Table("weights_activations", "Activation quantizers", activations),
        ]
        return Outcome(summary, [one for one in tables if one.rows], drawings)


@torch.no_grad()
def weight_row(layer: str, role: str, weight: Tensor, quantizer: Quantizer | None) -> Row:
    """What is known of one tensor."""
    weight = weight.float()
    row: Row = {
        "layer": layer,
        "role": role,
        "quantizer": "float" if quantizer is None else quantizer.spec.quantizer,
        "bits": FLOAT_BITS if quantizer is None else quantizer.spec.bits,
        "weights": weight.numel(),
        "kurtosis": float(kurtosis(weight)),
    }
    if quantizer is not None:
        grid = quantizer.grid(weight)
        rounded = weight if grid is None else grid.shift(weight)
        error = rounded - quantizer(weight).float()
        row |= use_of_codes(quantizer, weight)
        row["SNR (dB)"] = 10 * float((rounded.square().sum() / error.square().sum()).log10())
        if grid is not None:
            row["near a threshold, %"] = 100 * float(
                grid.near_threshold(weight, BOUNDARY).float().mean()
            )
    return row


def latent_weights(net: nn.Module) -> Iterator[LatentWeight]:
    """Every weight of a Linear or convolution and every folded matrix, in the order of the modules; see `LatentWeight`."""
    sites: dict[str, list[Site]] = defaultdict(list)
    for site in iter_quantizers(net):
        sites[site.layer] += [site] if site.is_weight else []
    for name, module in net.named_modules():
        for site in sites[name]:
            yield (
                name,
                site.role,
                site.latent().detach(),
                None if site.quantizer.is_float else site.quantizer,
            )
        if not sites[name] and isinstance(module, nn.Linear | nn.Conv2d):
            yield name, "weight", module.weight.detach(), None


@torch.no_grad()
def use_of_codes(quantizer: Quantizer, x: Tensor) -> Row:
    """How a tensor uses the codes of a quantizer; `clipped` is what lies beyond the outermost levels by more than half a step size."""
    grid, codes = quantizer.grid(x), quantizer.codes(x)
    ends = quantizer.spec if grid is None else grid
    low, high = ends.qmin, ends.qmax
    # A code outside of the bounds, which a user's own quantizer may have, counts as the outermost one.
    codes = (codes if grid is None else grid.in_order(codes)).flatten().long().clamp(
        low, high
    ) - low
    shares = torch.bincount(codes, minlength=high - low + 1) / codes.numel()
    row: Row = {
        "unused levels": int((shares == 0).sum()),
        "at the end codes, %": 100 * float(shares[0] + shares[-1]),
    }
    if grid is not None:
        z = grid.to_code_coordinates(x)
        row["clipped, %"] = 100 * float(((z < low - 0.5) | (z > high + 0.5)).float().mean())
    return row


def activation_rows(net: nn.Module, images: Tensor) -> list[Row]:
    """What some images (B, C, H, W) make of the codes of each activation quantizer; a row for each, in the order in which they ran."""
    rows: dict[str, Row] = {}

    def watch(site: Site, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        spec, x = site.quantizer.spec, args[0].detach().float()
        known = {
            "quantizer of": site.name,
            "role": site.role,
            "quantizer": spec.quantizer,
            "bits": spec.bits,
        }
        rows[site.name] = {
            **known,
            "values from": float(x.min()),
            "values to": float(x.max()),
            **use_of_codes(site.quantizer, x),
        }

    sites = [
        site for site in iter_quantizers(net) if not site.is_weight and not site.quantizer.is_float
    ]
    with probing(
        net,
        [
            site.quantizer.register_forward_pre_hook(functools.partial(watch, site))
            for site in sites
        ],
    ):
        net(images)
    return list(rows.values())


def _summary(rows: Sequence[Row]) -> Row:
    coded = [row for row in rows if row["bits"] < FLOAT_BITS]
    found = {
        "weights": sum(row["weights"] for row in rows),
        "quantized_weights": sum(row["weights"] for row in coded),
    }
    found["kurtosis_highest"] = max(row["kurtosis"] for row in rows)
    for name, column in (
        ("clipped_percent", "clipped, %"),
        ("near_threshold_percent", "near a threshold, %"),
    ):
        known = [row for row in coded if column in row]
        found[name] = sum(row[column] * row["weights"] for row in known) / max(
            sum(row["weights"] for row in known), 1
        )
    return found


def _histograms(file: str, title: str, shown: Sequence[tuple[LatentWeight, Row]]) -> Drawing:
    """A panel for each tensor: the distribution of the float weights on the axis of codes, levels as dots, thresholds as lines."""
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    (drawn, axes), said = panels(rows, columns, height=0.5 + 1.75 * rows), []
    for axis, ((layer, role, weight, quantizer), row) in zip(axes, shown, strict=False):
        name = layer if role == "weight" else f"{layer} ({role})"
        numbers = f"kurtosis {row['kurtosis']:.2f}" + (
            f", {row['bits']} bit, SNR {row['SNR (dB)']:.1f} dB" if quantizer else ""
        )
        said.append(f"{name}: {numbers}")
        axis.set_title(f"{name[-34:]}\n{numbers}", fontsize=7, loc="left")
        axis.grid(visible=False)
        _histogram(axis, weight.float(), quantizer)
    for axis in axes[len(shown) :]:
        axis.remove()
    drawn.supylabel("share of weights, %", fontsize=9)
    words = "Histograms of float weights; with codes, dots are the levels and dashed lines the thresholds"
    return Drawing(file, title, f"{words}. {'; '.join(said)}.", drawn)


def _histogram(axis: Axes, weight: Tensor, quantizer: Quantizer | None) -> None:
    """One panel; the outermost bins hold what lies beyond them as well."""
    grid = None if quantizer is None else quantizer.grid(weight)
    if grid is None:
        values, low, high = (weight - weight.mean()) / weight.std().clamp(min=1e-30), -6.0, 6.0
    else:
        values, low, high = grid.to_code_coordinates(weight), grid.qmin - 1.5, grid.qmax + 1.5
        if len(levels := range(grid.qmin, grid.qmax + 1)) > MOST_LEVELS:
            # Of 256 codes most may be empty: only the part that is occupied is drawn.
            low, high = max(low, float(values.min()) - 0.5), min(high, float(values.max()) + 0.5)
        else:
            axis.vlines(
                [level - 0.5 for level in levels[1:]],
                0,
                1,
                GREY,
                "--",
                linewidth=0.7,
                transform=axis.get_xaxis_transform(),
            )
            axis.plot(
                levels,
                [0] * len(levels),
                "o",
                color=PALETTE[1],
                markersize=3.5,
                clip_on=False,
                zorder=5,
            )
    shares = (
        100 * torch.histc(values.clamp(low, high), bins=BINS, min=low, max=high) / values.numel()
    )
    axis.stairs(
        shares.cpu(), torch.linspace(low, high, BINS + 1), fill=True, color=PALETTE[0], alpha=0.75
    )
    axis.set_xlabel("standard deviations" if grid is None else "code", fontsize=7, labelpad=1)
    axis.set(xlim=(low, high), ylim=(0, None))
