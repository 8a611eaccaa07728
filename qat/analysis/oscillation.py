"""Weights that oscillate in training, from files of the run (source: arXiv 2203.11086)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qat.analysis.analysis import (
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
from qat.errors import UsageError
from qat.utils.files import csv_rows

Curve = Mapping[int, float]  # by optimizer step
OSCILLATING = "oscillating weights, %"
FLIPS = "flips a step"


@dataclass(frozen=True)
class OscillationAnalysis(Analysis):
    """Oscillating weights and flips of codes, over a run and by layer at the end of the run.

    The run must have used the callback `qat.callbacks.Oscillation`.
    """

    name: ClassVar[str] = "oscillation"
    split: ClassVar[str | None] = None

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Make a figure from `metrics.csv` and a table from `oscillation.csv`, if these have data.

        Raises:
            UsageError: a model has no checkpoint, or its run logged no oscillation.
        """
        curves: dict[str, dict[str, Curve]] = {}
        layers: list[Row] = []
        for studied_net in nets:
            if studied_net.path is None:
                raise UsageError(
                    "ckpt=null: must be a checkpoint of a run that tracked oscillation"
                )
            folder = studied_net.path.resolve().parent
            if folder.name == "checkpoints":
                folder = folder.parent
            curves[studied_net.label] = read_curves(folder / "metrics.csv")
            path = folder / "oscillation.csv"  # exists only after a run has ended
            rows = csv_rows(path) if path.is_file() else []
            if not (curves[studied_net.label][OSCILLATING] or rows):
                raise UsageError(
                    f"ckpt={str(studied_net.path)!r}: this run did not track oscillation; "
                    "train with callbacks=[default,oscillation]"
                )
            for row in rows:
                layers.append({"net": studied_net.label, **row})
        summary: dict[str, dict[str, float]] = {label: {} for label in curves}
        for label, curves_of_run in curves.items():
            for name, curve in curves_of_run.items():
                if curve:
                    summary[label][name] = list(curve.values())[-1]
        tables = [Table("oscillation", "Layers at the end of the run", layers)] if layers else []
        drawings = [_draw_curves(curves)] if any(summary.values()) else []
        return Outcome(summary, tables, drawings)


def read_curves(path: Path) -> dict[str, Curve]:
    """Read `OSCILLATING` and `FLIPS` from `metrics.csv`; without values, a curve is empty.

    If a resumed run logged a step twice, the later line counts.
    """
    rows = [row for row in csv_rows(path) if row.get("step")] if path.is_file() else []
    fractions = _column_by_step(rows, "osc/share")
    flips = _column_by_step(rows, "osc/flips")
    flips_per_step = {}
    for (earlier_step, earlier), (step, later) in itertools.pairwise(flips.items()):
        flips_per_step[step] = (later - earlier) / (step - earlier_step)
    return {
        OSCILLATING: {step: 100 * fraction for step, fraction in fractions.items()},
        FLIPS: flips_per_step,
    }


def _column_by_step(rows: Sequence[Row], column: str) -> dict[int, float]:
    """Values of a column by optimizer step, in ascending order of steps."""
    values = {}
    for row in rows:
        if row.get(column):
            values[int(float(row["step"]))] = float(row[column])
    return dict(sorted(values.items()))


def _draw_curves(curves: Mapping[str, Mapping[str, Curve]]) -> Drawing:
    """Draw a line over optimizer steps for each run.

    All lines except the first are dashed, so that lines that coincide can be told apart.
    """
    names = []
    for name in (OSCILLATING, FLIPS):
        if any(curves_of_run[name] for curves_of_run in curves.values()):
            names.append(name)
    figure, axes = panels(len(names), height=0.7 + 1.7 * len(names), sharex=True)
    descriptions = []
    for panel, name in zip(axes, names, strict=True):
        for i, (label, curves_of_run) in enumerate(curves.items()):
            steps = list(curves_of_run[name])
            values = list(curves_of_run[name].values())
            style = "--" if i else "-"
            color = PALETTE[i % len(PALETTE)]
            panel.plot(steps, values, style, color=color, linewidth=1.3, label=label)
            if values:
                descriptions.append(
                    f"{label}: {name} {values[0]:.2f} at first, {max(values):.2f} at most, "
                    f"{values[-1]:.2f} at the end"
                )
        panel.set(ylabel=name, ylim=(0, None))
    axes[-1].set_xlabel("optimizer step")
    axes[0].legend(fontsize=8, frameon=False)
    title = "Oscillation over the training"
    return Drawing("oscillation", title, "; ".join(descriptions), figure)
