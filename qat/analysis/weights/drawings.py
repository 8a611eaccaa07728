"""Histograms of weights, a map of the use of codes, a chart of kurtoses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from qat.analysis.analysis import Drawing
from qat.analysis.style import GREY, HEAT, PALETTE, axes, colours, figure, panels
from qat.analysis.weights.weight_stats import Codes, Histogram, WeightStats
from qat.functional.kurtosis import UNIFORM_KURTOSIS

_COLUMNS = 3
# More levels than this are not drawn one by one.
_DRAWN_LEVELS = 20
_MAP_COLUMNS = 16
_LABELS = 36
_NUMBERED_COLUMNS = 8
NORMAL_KURTOSIS = 3.0


def histograms(name: str, title: str, chosen: Sequence[WeightStats]) -> Drawing:
    """One panel a tensor: the distribution of the float weights on the axis of codes, levels as dots, thresholds as lines."""
    columns = min(_COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    drawn = figure(height=0.5 + 1.75 * rows)
    grid = panels(drawn, rows, columns)
    for axis, stats in zip(grid, chosen, strict=False):
        _histogram(axis, stats)
    for axis in grid[len(chosen) :]:
        axis.set_visible(False)
    drawn.supylabel("share of weights, %", fontsize=9)
    said = "; ".join(f"{stats.title}: {_figures(stats)}" for stats in chosen)
    return Drawing(
        name, title, f"Histograms of float weights; with codes, dots are the levels and dashed lines the thresholds. {said}.", drawn
    )


def _histogram(axis: Axes, stats: WeightStats) -> None:
    found = stats.histogram
    edges = np.linspace(found.low, found.high, len(found.share) + 1)
    axis.stairs(100 * np.asarray(found.share), edges, fill=True, color=PALETTE[0], alpha=0.75)
    axis.grid(visible=False)
    axis.margins(x=0)
    axis.set_ylim(bottom=0)
    axis.set_title(f"{short(stats.title)}\n{_figures(stats)}", fontsize=7, loc="left")
    axis.tick_params(labelsize=7)
    axis.set_xlabel("standard deviations" if stats.codes is None else "code", fontsize=7, labelpad=1)
    if stats.codes is not None and len(stats.codes.usage) <= _DRAWN_LEVELS:
        _levels(axis, stats.codes, found)


def _levels(axis: Axes, codes: Codes, found: Histogram) -> None:
    levels = np.arange(codes.low, codes.low + len(codes.usage))
    for threshold in levels[:-1] + 0.5:
        axis.axvline(threshold, color=GREY, linewidth=0.7, linestyle=(0, (4, 2)))
    inside = [level for level in levels if found.low <= level <= found.high]
    axis.plot(inside, np.zeros(len(inside)), "o", color=PALETTE[1], markersize=3.5, clip_on=False, zorder=5)
    axis.set_xticks(levels if len(levels) <= 8 else levels[:: max(len(levels) // 4, 1)])
    axis.set_xlim(min(found.low, codes.low - 0.5), max(found.high, levels[-1] + 0.5))


def _figures(stats: WeightStats) -> str:
    if stats.codes is None:
        return f"float, kurtosis {stats.kurtosis:.2f}"
    return f"{stats.bits} bit, kurtosis {stats.kurtosis:.2f}, SNR {stats.codes.snr:.1f} dB"


def short(title: str, length: int = 34) -> str:
    """A name whose beginning is left out where it is long."""
    return title if len(title) <= length else f"...{title[3 - length :]}"


def code_usage_map(name: str, title: str, coded: Sequence[WeightStats]) -> Drawing:
    """Layers down, codes across, the share of weights as colour. Where some tensors have few levels, those alone; else ranges of codes."""
    few = [stats for stats in coded if stats.codes is not None and len(stats.codes.usage) <= _MAP_COLUMNS]
    shown = few or list(coded)
    rows = [stats.codes for stats in shown if stats.codes is not None]
    first = min(codes.low for codes in rows) if few else 0
    columns = max(codes.low + len(codes.usage) for codes in rows) - first if few else _MAP_COLUMNS
    image = np.full((len(rows), columns), np.nan)
    for line, codes in zip(image, rows, strict=True):
        values = np.asarray(codes.usage) if few else _grouped(codes.usage)
        start = codes.low - first if few else 0
        line[start : start + len(values)] = 100 * values
    drawn = figure(height=min(1.2 + 0.16 * len(rows), 9.0))
    axis = axes(drawn, "code" if few else "sixteenth of the range of codes", "")
    shades = axis.imshow(image, cmap=HEAT, aspect="auto", interpolation="nearest", vmin=0)
    axis.grid(visible=False)
    _cell_texts(axis, image)
    axis.set_xticks(range(columns), [str(first + c) if few else str(c + 1) for c in range(columns)], fontsize=7)
    label_layers(axis, [stats.title for stats in shown])
    drawn.colorbar(shades, ax=axis, label="share of weights, %", shrink=0.8)
    left_out = f" {len(coded) - len(shown)} tensors with more than {_MAP_COLUMNS} levels are left out." if len(shown) < len(coded) else ""
    return Drawing(name, title, f"Share of weights at each code, layer by layer. {_spoken_usage(shown)}{left_out}", drawn)


def _cell_texts(axis: Axes, image: NDArray[np.float64]) -> None:
    """Numbers in the cells, where they are large enough for that."""
    if image.shape[1] > _NUMBERED_COLUMNS or image.shape[0] > _LABELS:
        return
    darkest = np.nanmax(image)
    for (row, column), value in np.ndenumerate(image):
        if not np.isnan(value):
            colour = "white" if value > darkest / 2 else "black"
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=colour)


def _grouped(usage: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray([part.sum() for part in np.array_split(np.asarray(usage), _MAP_COLUMNS)])


def _spoken_usage(shown: Sequence[WeightStats]) -> str:
    entropies = [stats.codes.entropy for stats in shown if stats.codes is not None]
    unused = sum(stats.codes.unused > 0 for stats in shown if stats.codes is not None)
    spread = f"{min(entropies):.2f} to {max(entropies):.2f} bits"
    return f"{len(shown)} tensors; the entropy of their codes is {spread}; {unused} have unused levels."


def label_layers(axis: Axes, names: Sequence[str]) -> None:
    """Names of layers down the side, some left out where there are many."""
    every = math.ceil(len(names) / _LABELS)
    axis.set_yticks(range(0, len(names), every), [short(name) for name in names[::every]], fontsize=6.5)


def kurtosis_chart(name: str, title: str, weights: Mapping[str, Sequence[WeightStats]]) -> Drawing:
    """A bar a layer, or lines of several nets; where uniform and normal weights would lie is drawn."""
    longest = max(weights.values(), key=len)
    names = [stats.title for stats in longest]
    drawn = figure(height=3.4)
    axis = axes(drawn, "", "kurtosis")
    for colour, (label, stats) in zip(colours(), weights.items(), strict=False):
        values = [entry.kurtosis for entry in stats]
        if len(weights) == 1:
            axis.bar(range(len(values)), values, color=colour, width=0.7)
        else:
            axis.plot(range(len(values)), values, "o-", color=colour, markersize=3, linewidth=1, label=label)
    for value, meaning in ((UNIFORM_KURTOSIS, "uniform"), (NORMAL_KURTOSIS, "normal")):
        axis.axhline(value, color=GREY, linewidth=0.9, linestyle="--")
        axis.annotate(
            f"{meaning} {value:g}", (1.005, value), xycoords=("axes fraction", "data"), fontsize=7.5, va="center", color="#505050"
        )
    every = math.ceil(len(names) / _LABELS)
    axis.set_xticks(range(0, len(names), every), [short(n) for n in names[::every]], rotation=90, fontsize=6.5)
    axis.set_xlim(-0.7, len(names) - 0.3)
    top = max(entry.kurtosis for stats in weights.values() for entry in stats)
    if top > 20:
        axis.set_yscale("log")
    if len(weights) > 1:
        axis.legend(fontsize=8, frameon=False)
    return Drawing(
        name, title, f"Kurtosis of each weight tensor; uniform weights have 1.8, normal ones 3. {_spoken_kurtoses(weights)}", drawn
    )


def _spoken_kurtoses(weights: Mapping[str, Sequence[WeightStats]]) -> str:
    said = []
    for label, stats in weights.items():
        if stats:
            highest, lowest = (pick(stats, key=lambda entry: entry.kurtosis) for pick in (max, min))
            said.append(f"{label}: from {lowest.kurtosis:.2f} ({lowest.title}) to {highest.kurtosis:.2f} ({highest.title})")
    return "; ".join(said) + "."
