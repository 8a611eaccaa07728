"""Pictures of a robustness analysis: two curves, and two charts with a row for each thing that is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qat.analysis.analysis import Drawing
from qat.analysis.style import GREY, axes, colours, figure
from qat.utils.validate import FLOAT_BITS

Curve = list[tuple[float, float]]
TOP1 = "top-1 accuracy (%)"
# Where float stands on an axis of bits.
_FLOAT_AT = 10.0
_BAND = "#F4F6F8"
# Of a row's height, what the nets share; the rest tells rows apart.
_SPREAD = 0.44


@dataclass(frozen=True)
class Dot:
    """A place on a row.

    Attributes:
        top1: percent.
        size: 1 to 5, drawn larger and stronger.
    """

    top1: float
    size: int = 3


def step_sizes(nets: Mapping[str, tuple[Curve, float | None]], tolerance: float) -> Drawing:
    """Accuracy over the ratio of all weight steps.

    Args:
        nets: by label: curve of (ratio, percent), and the percent at ratio 1.
        tolerance: points below the accuracy at 1 where a line is drawn.
    """
    made = figure()
    axis = axes(made, "weight step used / weight step of the net", TOP1)
    words = []
    for (label, (curve, at_one)), colour in zip(nets.items(), colours(), strict=False):
        ratios, percents = zip(*curve, strict=True)
        lowest = min(curve, key=lambda point: point[1])
        axis.plot(ratios, percents, "-o", color=colour, markersize=3, linewidth=1.4, label=f"{label} (lowest {lowest[1]:.1f} %)")
        words.append(f"{label}: lowest {lowest[1]:.1f} % at ratio {lowest[0]:g}")
        if at_one is not None:
            axis.plot([1.0], [at_one], "*", color=colour, markersize=12, markeredgecolor="white")
            axis.axhline(at_one - tolerance, color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
            words[-1] += f", {at_one:.1f} % at ratio 1"
    _percent(axis)
    _legend(made, axis)
    low, high = (end for end in (min(c[0][0] for c, _ in nets.values()), max(c[-1][0] for c, _ in nets.values())))
    alt = f"Accuracy when every weight step is multiplied by a ratio from {low:g} to {high:g}. {'; '.join(words)}."
    return Drawing("step_sizes", f"Accuracy when all weight steps change (star: as trained, dotted: {tolerance:g} points less)", alt, made)


def bit_widths(nets: Mapping[str, tuple[Curve, float | None, float | None]]) -> Drawing:
    """Accuracy over the width of the weights.

    Args:
        nets: by label: curve of (bits, percent), the width as trained, and the percent there.
    """
    made = figure()
    axis = axes(made, "bits of the weights", TOP1)
    words = []
    for (label, (curve, width, clean)), colour in zip(nets.items(), colours(), strict=False):
        axis.plot([_place(bits) for bits, _ in curve], [top1 for _, top1 in curve], "-o", color=colour, markersize=4, label=label)
        if width is not None and clean is not None:
            axis.plot([_place(width)], [clean], "*", color=colour, markersize=13, markeredgecolor="white", zorder=3)
        words.append(f"{label}: " + ", ".join(f"{_bits(bits)} {top1:.1f} %" for bits, top1 in curve))
    ticks = sorted({bits for curve, _, _ in nets.values() for bits, _ in curve})
    axis.set_xticks([_place(bits) for bits in ticks], ["float" if bits == FLOAT_BITS else f"{bits:g}" for bits in ticks])
    _percent(axis)
    _legend(made, axis)
    alt = f"Accuracy when the weights are quantized to other widths, activations as trained. {'; '.join(words)}."
    return Drawing("bit_widths", "Accuracy at other widths of the weights (star: as trained)", alt, made)


def policies(nets: Mapping[str, Mapping[str, Sequence[Dot]]]) -> Drawing:
    """Accuracy by what is done to the weights; see `_chart`."""
    alt = f"Accuracy when the weights are rounded or clipped in other ways. {_in_words(nets)}."
    return Drawing("policies", "Accuracy under other quantizers of the weights", alt, _chart(nets))


def corruptions(nets: Mapping[str, Mapping[str, Sequence[Dot]]], severities: Sequence[int]) -> Drawing:
    """Accuracy by kind and severity of a corruption; see `_chart`."""
    named = ", ".join(map(str, severities))
    alt = f"Accuracy on corrupted images, severities {named}. {_in_words(nets)}."
    return Drawing("corruptions", f"Accuracy on corrupted images (severities {named})", alt, _chart(nets))


def _in_words(nets: Mapping[str, Mapping[str, Sequence[Dot]]]) -> str:
    said = []
    for label, rows in nets.items():
        values = (f"{_words(name)} {', '.join(f'{dot.top1:.1f}' for dot in dots)} %" for name, dots in rows.items())
        said.append(f"{label}: {'; '.join(values)}")
    return ". ".join(said)


def _chart(nets: Mapping[str, Mapping[str, Sequence[Dot]]]) -> Figure:
    """A line for each row and net, with its dots; a vertical line where nothing is done."""
    names = list(dict.fromkeys(name for rows in nets.values() for name in rows))
    made = figure(height=1.2 + 0.2 * len(names) * (1 + len(nets)) * (0.8 if len(nets) > 1 else 0.7))
    axis = axes(made, TOP1)
    for place, ((label, rows), colour) in enumerate(zip(nets.items(), colours(), strict=False)):
        shift = 0.0 if len(nets) == 1 else _SPREAD * (place / (len(nets) - 1) - 0.5)
        for name, dots in rows.items():
            _row(axis, names.index(name) + shift, dots, colour)
        axis.plot([], [], "o", color=colour, label=label)
        if "none" in rows:
            axis.axvline(rows["none"][0].top1, color=colour, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    for row in range(0, len(names), 2):
        axis.axhspan(row - 0.5, row + 0.5, color=_BAND, zorder=0)
    axis.set_yticks(range(len(names)), [_words(name) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    _percent(axis, "x")
    sizes = sorted({dot.size for rows in nets.values() for dots in rows.values() if len(dots) > 1 for dot in dots})
    for size in sizes:
        axis.scatter([], [], s=_area(size), color=GREY, label=f"severity {size}")
    if len(nets) > 1 or sizes:
        _legend(made, axis, len(nets))
    return made


def _row(axis: Axes, height: float, dots: Sequence[Dot], colour: str) -> None:
    values = [dot.top1 for dot in dots]
    axis.plot([min(values), max(values)], [height, height], color=colour, linewidth=1, alpha=0.5, zorder=2)
    axis.scatter(
        values,
        [height] * len(dots),
        s=[_area(dot.size) for dot in dots],
        color=colour,
        alpha=0.85,
        edgecolors="white",
        linewidths=0.6,
        zorder=3,
    )
    if len(dots) == 1:
        axis.annotate(f"{values[0]:.1f}", (values[0], height), (6, 0), textcoords="offset points", va="center", fontsize=7, color=GREY)


def _area(size: int) -> float:
    return 12 + 11 * size


def _words(name: str) -> str:
    return "no change" if name == "none" else name.replace("_", " ")


def _bits(bits: float) -> str:
    return "float" if bits == FLOAT_BITS else f"{bits:g} bit"


def _place(bits: float) -> float:
    return _FLOAT_AT if bits == FLOAT_BITS else bits


def _percent(axis: Axes, which: str = "y") -> None:
    """Room for what is there, within 0 and 100."""
    low, high = axis.get_ylim() if which == "y" else axis.get_xlim()
    ends = max(min(low, high) - 2, 0 if min(low, high) >= 0 else -2), min(max(low, high) + 2, 102)
    axis.set(**{f"{which}lim": ends})


def _legend(made: Figure, axis: Axes, first: int | None = None) -> None:
    """Names above the axes; of those behind the `first`, a second line."""
    handles, labels = axis.get_legend_handles_labels()
    for start, end in ((0, first), (first, None)) if first is not None else ((0, None),):
        some = handles[start:end], labels[start:end]
        if some[0]:
            made.legend(*some, loc="outside upper left" if not start else "outside upper right", ncols=3, fontsize=8, frameon=False)
