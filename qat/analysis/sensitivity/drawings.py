"""Pictures of sensitivity: bars of parts, a heat map of bits and parts, size against loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from qat.analysis.analysis import Drawing, Row
from qat.analysis.sensitivity.mix import MB, Mix
from qat.analysis.style import GREY, PALETTE, WIDTH, axes, figure, panels

MOST_BARS = 40
Change = tuple[float | None, float | None]


@dataclass(frozen=True)
class PartFigures:
    """What was measured of one part. A change is of loss and of top-1 (points); None = not measured.

    Attributes:
        quantizers: number of its quantizers.
        weights: number of entries of its weights.
        bits: of its weights, None where they differ.
        only: quantized alone against all in float.
        without: left in float against the net as it is.
        widths: its weights at other bits against the net as it is.
    """

    name: str
    quantizers: int
    weights: int
    bits: int | None
    only: Change
    without: Change
    widths: Mapping[int, Change]

    def as_row(self, label: str) -> Row:
        """Columns of the table."""
        row: Row = {"net": label, "part": self.name, "quantizers": self.quantizers, "weights": self.weights, "bits": self.bits}
        changes = {"quantized alone": self.only, "left in float": self.without} | {f"{b} bits": c for b, c in self.widths.items()}
        for name, (loss, top1) in changes.items():
            row |= {f"{name}: loss change": loss, f"{name}: top-1 change (points)": top1}
        return row


def draw_bars(label: str, parts: Sequence[PartFigures], name: str) -> Drawing | None:
    """What each part costs, quantized alone and left in float; None without such measurements."""
    panes = {
        "quantized alone: loss above float": {part.name: part.only[0] for part in parts if part.only[0] is not None},
        "left in float: loss below the net as it is": {part.name: -part.without[0] for part in parts if part.without[0] is not None},
    }
    panes = {title: costs for title, costs in panes.items() if costs}
    if not panes:
        return None
    first = next(iter(panes.values()))
    names = sorted(first, key=lambda part: -float(first[part] or 0))[:MOST_BARS]
    of = figure(WIDTH, 1.0 + 0.17 * len(names))
    for axis, (title, costs), colour in zip(panels(of, 1, len(panes), sharey=True), panes.items(), PALETTE, strict=False):
        axis.barh(range(len(names)), [float(costs.get(part) or 0) for part in names], color=colour, height=0.7)
        axis.set_title(title, fontsize=9, loc="left")
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.xaxis.set_major_locator(MaxNLocator(4))
    left_out = f" (the {len(names)} largest of {len(first)})" if len(first) > len(names) else ""
    told = "; ".join(f"{title}: {_ranked(costs)}" for title, costs in panes.items())
    return Drawing(name, f"What the quantization of each part of {label} costs{left_out}", f"Bars of loss changes. {told}.", of)


def _ranked(costs: Mapping[str, float | None]) -> str:
    """The largest ones in words."""
    ordered = sorted(costs.items(), key=lambda entry: -float(entry[1] or 0))[:3]
    return "largest for " + ", ".join(f"{name} ({value:+.4f})" for name, value in ordered)


def draw_bits(label: str, parts: Sequence[PartFigures], widths: Sequence[int], picked: Mix | None, name: str) -> Drawing | None:
    """Loss changes by bits and part, parts in the order of the net; None without such measurements. `picked` bits are framed."""
    shown = [part for part in parts if any(loss is not None for bits, (loss, _) in part.widths.items() if bits != part.bits)]
    if not shown:
        return None
    columns = sorted(widths)
    losses = torch.tensor([[_number(part.widths[bits][0]) for bits in columns] for part in shown], dtype=torch.float64)
    of = figure(0.62 * WIDTH, 1.1 + 0.19 * len(shown))
    axis = axes(of, "bits of the weights")
    reach = float(losses.nan_to_num().abs().max()) or 1.0
    # A step of colour is a factor: one part may cost a thousand times what another does.
    norm = SymLogNorm(linthresh=reach / 100, vmin=-reach, vmax=reach)
    image = axis.imshow(losses.numpy(), aspect="auto", cmap="PuOr_r", norm=norm)
    _label_cells(axis, losses, norm, shown, columns)
    axis.set_xticks(range(len(columns)), [str(bits) for bits in columns])
    axis.set_yticks(range(len(shown)), [part.name for part in shown], fontsize=8)
    axis.grid(visible=False)
    for row, part in enumerate(shown if picked else ()):
        if picked and picked.bits.get(part.name) in columns:
            at = columns.index(picked.bits[part.name])
            axis.add_patch(Rectangle((at - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor="black", linewidth=1.6))
    of.colorbar(image, ax=axis, label="loss against the net as it is", shrink=0.8)
    framed = " Framed: the suggested bits." if picked else ""
    alt = f"Heat map of {len(shown)} parts and {len(columns)} widths. {_extremes(shown, columns)}{framed}"
    return Drawing(name, f"Loss of {label} when one part has other bits.{framed}", alt, of)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _label_cells(axis: Axes, losses: torch.Tensor, norm: SymLogNorm, parts: Sequence[PartFigures], columns: Sequence[int]) -> None:
    reach = float(losses.nan_to_num().abs().max())
    digits = 2 if reach >= 1 else 3 if reach >= 0.1 else 4
    for row, line in enumerate(losses.tolist()):
        for column, value in enumerate(line):
            if value == value:  # not NaN
                text = "as is" if parts[row].bits == columns[column] else f"{value:+.{digits}f}"
                dark = abs(float(norm(value)) - 0.5) > 0.33
                axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")


def _extremes(parts: Sequence[PartFigures], widths: Sequence[int]) -> str:
    told = []
    for bits in widths:
        known = {part.name: part.widths[bits][0] for part in parts if part.widths[bits][0] is not None and part.bits != bits}
        if known:
            worst = max(known, key=lambda name: float(known[name] or 0))
            told.append(f"at {bits} bits {worst} adds most ({known[worst]:+.4f})")
    return "; ".join(told) + "."


def draw_mixes(rows: Sequence[Row], labels: Sequence[str]) -> Drawing | None:
    """Size against loss of suggested and of equal bits; None where none was evaluated."""
    shown = [row for row in rows if row["loss"] is not None]
    if not shown:
        return None
    of = figure(WIDTH, 3.4)
    axis = axes(of, "size as stored (MB)", "loss")
    told = []
    for label, colour in zip(labels, PALETTE, strict=False):
        equal = sorted(
            (row["size_bytes"] / MB, row["loss"], row["bits"]) for row in shown if row["net"] == label and row["choice"] == "uniform"
        )
        mixed = sorted(
            (row["size_bytes"] / MB, row["loss"], row["expected_loss"])
            for row in shown
            if row["net"] == label and row["choice"] == "suggested"
        )
        _line(axis, equal, f"{label}: equal bits", color=colour, marker="o", linestyle="--", linewidth=1)
        for size, loss, bits in equal:
            axis.annotate(f"{bits}", (size, loss), textcoords="offset points", xytext=(4, 5), fontsize=8, color=colour)
        _line(axis, mixed, f"{label}: suggested", color=colour, marker="*", markersize=11, linestyle="none")
        expected: list[tuple[Any, ...]] = [(size, loss) for size, _, loss in mixed]
        _line(axis, expected, f"{label}: if losses added up", color=colour, marker="_", markersize=11, linestyle="none")
        told += [f"{label} suggested {size:.4f} MB: loss {loss:.4f}, expected {guess:.4f}" for size, loss, guess in mixed]
        told += [f"{label} with {bits} bits everywhere {size:.4f} MB: loss {loss:.4f}" for size, loss, bits in equal]
    losses = [row["loss"] for row in shown]
    if max(losses) > 10 * min(losses):
        axis.set_yscale("log")
    axis.legend(fontsize=8, frameon=False)
    return Drawing("mixed_precision", "Bits for each part against equal bits", "; ".join(told) + ".", of)


def _line(axis: Axes, points: Sequence[tuple[Any, ...]], label: str, **style: Any) -> None:
    if points:
        axis.plot([point[0] for point in points], [point[1] for point in points], label=label, **style)
