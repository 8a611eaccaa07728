"""How weights of a net oscillated while it was trained, from what the callback wrote. Source: arXiv 2203.11086."""

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
SHARE, FLIPS = "oscillating weights, %", "flips a step"


@dataclass(frozen=True)
class OscillationAnalysis(Analysis):
    """Share of oscillating weights and flips over the run of a checkpoint; layers at its end.

    The run must have had `callbacks=[default,oscillation]`.
    """

    name: ClassVar[str] = "oscillation"
    split: ClassVar[str | None] = None

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Read `metrics.csv` and `oscillation.csv` of the runs; one figure, one table.

        Raises:
            UsageError: a run tracked no oscillations.
        """
        curves: dict[str, dict[str, Curve]] = {}
        layers: list[Row] = []
        for studied in nets:
            folder = (studied.path or Path("-")).resolve().parent
            folder = folder.parent if folder.name == "checkpoints" else folder
            curves[studied.label] = read_curves(folder / "metrics.csv")
            at_end = folder / "oscillation.csv"  # of a run that has ended
            rows = csv_rows(at_end) if at_end.is_file() else []
            if not (curves[studied.label][SHARE] or rows):
                raise UsageError(
                    f"ckpt={str(studied.path)!r}: its run did not track oscillation; train with callbacks=[default,oscillation]"
                )
            layers += [{"net": studied.label, **row} for row in rows]
        summary = {
            label: {name: [*curve.values()][-1] for name, curve in found.items() if curve}
            for label, found in curves.items()
        }
        tables = [Table("oscillation", "Layers at the end of the run", layers)] if layers else []
        return Outcome(summary, tables, [_draw(curves)] if any(summary.values()) else [])


def read_curves(path: Path) -> dict[str, Curve]:
    """Curves of a log; of a step that is there twice, in a run that was resumed, the later line counts."""
    rows = [row for row in csv_rows(path) if row.get("step")] if path.is_file() else []

    def logged(column: str) -> dict[int, float]:
        found = {int(float(row["step"])): float(row[column]) for row in rows if row.get(column)}
        return dict(sorted(found.items()))

    flips = itertools.pairwise(logged("osc/flips").items())
    return {
        SHARE: {step: 100 * share for step, share in logged("osc/share").items()},
        FLIPS: {b: (later - earlier) / (b - a) for (a, earlier), (b, later) in flips},
    }


def _draw(curves: Mapping[str, Mapping[str, Curve]]) -> Drawing:
    """Over optimizer steps, a line for each run; the later ones are dashed, as runs that share their first steps lie on each other."""
    names = [name for name in (SHARE, FLIPS) if any(found[name] for found in curves.values())]
    (drawn, axes), said = panels(len(names), height=0.7 + 1.7 * len(names), sharex=True), []
    for axis, name in zip(axes, names, strict=True):
        for number, (label, found) in enumerate(curves.items()):
            values, colour = [*found[name].values()], PALETTE[number % len(PALETTE)]
            axis.plot(
                [*found[name]],
                values,
                "--" if number else "-",
                color=colour,
                linewidth=1.3,
                label=label,
            )
            if values:
                said.append(
                    f"{label}: {name} {values[0]:.2f} at first, {max(values):.2f} at most, {values[-1]:.2f} at the end"
                )
        axis.set(ylabel=name, ylim=(0, None))
    axes[-1].set_xlabel("optimizer step")
    axes[0].legend(fontsize=8, frameon=False)
    return Drawing("oscillation", "Oscillation over the training", "; ".join(said), drawn)
