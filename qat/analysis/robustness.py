"""Accuracy of a model whose weights have other step sizes or bit-widths than in training.

Protocol: KURE, arXiv 2002.07686. Conventions: docs/analysis.md, section Robustness.
"""

from __future__ import annotations

import functools
import operator
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qat.analysis.analysis import (
    PALETTE,
    Analysis,
    Drawing,
    EvaluationPoint,
    ImageSet,
    Outcome,
    Row,
    StudiedNet,
    Table,
    measure,
    panels,
)
from qat.analysis.requantize import (
    STEPS_FROM,
    WeightSite,
    changed,
    in_blocks,
    is_float,
    nearest_power_of_two,
    weight_sites,
)
from qat.errors import UsageError
from qat.utils.validate import (
    FLOAT_BITS,
    check_bits,
    check_choice,
    check_int,
    check_list,
    check_number,
)

STEPS = "steps"
BITS = "bits"
POWER_OF_TWO = "power_of_two"
PARTS = (STEPS, BITS, POWER_OF_TWO)
FLOAT_SCALES = {"channel": 0, "tensor": None}
# For each part: name, title, and label of the x axis.
FIGURES = {
    STEPS: (
        "step_sizes",
        "Accuracy when all step sizes of the weights change",
        "step size, as a multiple of its own",
    ),
    BITS: ("bit_widths", "Accuracy at other bit-widths of the weights", "bits of the weights"),
}
FLOAT_AT = 10  # position of float on the axis of bits


@dataclass(frozen=True)
class Robustness(Analysis):
    """The settings of `analysis/robustness.yaml`.

    Attributes:
        parts: parts of `PARTS` to run; None = all parts that a model allows.
        low: lowest factor of the step sizes.
        high: highest factor.
        ratios: number of factors, evenly spaced from `low` to `high`; the factor 1 is added.
        bits: bit-widths of the weights, 32 = float.
        steps_from: rule for step sizes at other bit-widths, one of `STEPS_FROM`.
        float_bits: bits to which float models are quantized for `steps` and `power_of_two`; None =
            these parts are left out.
        float_scales: float weights get step sizes per `channel` or per `tensor`.

    Raises:
        UsageError: a setting has a value that cannot work.
    """

    parts: Sequence[str] | None = None
    low: float = 0.7
    high: float = 1.3
    ratios: int = 21
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8, FLOAT_BITS)
    steps_from: str = "own"
    float_bits: int | None = None
    float_scales: str = "channel"

    name: ClassVar[str] = "robustness"

    def __post_init__(self) -> None:
        for part in () if self.parts is None else check_list("analysis.parts", self.parts):
            check_choice("analysis.parts", part, PARTS)
        for bits in check_list("analysis.bits", self.bits):
            check_bits("analysis.bits", bits, "float")
        check_number("analysis.low", self.low, 0, exclusive_lowest=True)
        check_number("analysis.high", self.high, self.low, exclusive_lowest=True)
        check_int("analysis.ratios", self.ratios, 2)
        check_choice("analysis.steps_from", self.steps_from, STEPS_FROM)
        if self.float_bits is not None:
            check_bits("analysis.float_bits", self.float_bits)
        check_choice("analysis.float_scales", self.float_scales, tuple(FLOAT_SCALES))

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Two curves for each model, their numbers, and the accuracy with powers of two.

        Raises:
            UsageError: a requested part needs quantized weights, and a model has none; or no
                weight of its blocks has a uniform grid.
        """
        summary: dict[str, Any] = {}
        table: list[Row] = []
        points_by_model = [self._points(studied) for studied in nets]
        for studied, points in zip(nets, points_by_model, strict=True):
            rows = measure(points, images)
            summary[studied.label] = _summary(rows)
            for row in rows:
                table.append(_renamed(row))
        drawings = []
        for part in FIGURES:
            rows = _rows_of(part, table)
            if rows:
                drawings.append(_draw(part, rows))
        title = "Accuracy with other step sizes and bit-widths of the weights"
        return Outcome(summary, [Table("robustness", title, table)], drawings)

    def _points(self, studied: StudiedNet) -> list[EvaluationPoint]:
        """Points to evaluate: the unchanged model, then the points of each part."""
        float_axis = FLOAT_SCALES[self.float_scales]
        net, weights = weight_sites(studied.net, studied.input_size, float_axis)
        blocks = in_blocks(weights)
        if not blocks:
            raise UsageError(
                f"analysis=robustness: {studied.label} has no weights in blocks on a uniform grid"
            )
        parts = {*(self.parts or PARTS)}
        # Changes of step sizes start from the quantized weights of the model; a float model is
        # quantized here first.
        sites = [site for site in weights if site.bits != FLOAT_BITS]
        base: dict[str, Any] = {}
        if is_float(weights) and self.float_bits is not None:
            sites = blocks
            base = {"bits": self.float_bits, "steps_from": self.steps_from}
        elif not sites:
            if self.parts is not None and parts != {BITS}:
                raise UsageError(
                    f"analysis.parts={self.parts}: {studied.label} has no quantized weights; "
                    "set analysis.float_bits, e.g. to 4"
                )
            parts = {BITS}

        def point(
            part: str,
            changed_sites: Sequence[WeightSite] = (),
            *,
            ratio: float | None = None,
            width: float | None = None,
            **change: Any,
        ) -> EvaluationPoint:
            key = {"net": studied.label, "part": part, "ratio": ratio, "bits": width}
            return EvaluationPoint(key, net, functools.partial(changed, changed_sites, **change))

        points = [point("clean", width=_mean_bits(blocks))]
        if STEPS in parts:
            for ratio in self._all_ratios():
                resize = functools.partial(operator.mul, ratio)
                points.append(point(STEPS, sites, ratio=ratio, **base, resize=resize))
        if BITS in parts:
            for bits in sorted(self.bits):
                # Weights that already have this number of bits keep their trained step sizes.
                other_sites = [site for site in blocks if site.bits != bits]
                points.append(
                    point(BITS, other_sites, width=bits, bits=bits, steps_from=self.steps_from)
                )
        if POWER_OF_TWO in parts:
            points.append(point(POWER_OF_TWO, sites, **base, resize=nearest_power_of_two))
        return points

    def _all_ratios(self) -> list[float]:
        """Factors of the step sizes in ascending order, including 1."""
        ratios = {1.0}
        for ratio in torch.linspace(self.low, self.high, self.ratios, dtype=torch.float64).tolist():
            ratios.add(float(f"{ratio:.6g}"))
        return sorted(ratios)


def _mean_bits(sites: Sequence[WeightSite]) -> float:
    """Mean bits of all weights; an int if the mean is whole."""
    total_bits = 0
    n_weights = 0
    for site in sites:
        total_bits += site.bits * site.shape.numel()
        n_weights += site.shape.numel()
    bits = total_bits / n_weights
    return bits if bits % 1 else int(bits)


def _renamed(row: Row) -> Row:
    """A row with the column names of the table."""
    return {"top-1 (%)" if name == "top1" else name: value for name, value in row.items()}


def _rows_of(part: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Summary of the curves of one model."""
    summary: dict[str, Any] = {"top1": rows[0]["top1"], "bits": rows[0]["bits"]}
    steps = _rows_of(STEPS, rows)
    if steps:
        worst = min(steps, key=operator.itemgetter("top1"))
        top1_at = {row["ratio"]: row["top1"] for row in steps}
        summary[STEPS] = {
            "at_1": top1_at[1],
            "lowest": worst["top1"],
            "lowest_at": worst["ratio"],
            "mean": statistics.fmean(top1_at.values()),
        }
    widths = _rows_of(BITS, rows)
    if widths:
        summary["widths"] = {_tick(row): row["top1"] for row in widths}
    powers = _rows_of(POWER_OF_TWO, rows)
    if powers:
        summary[POWER_OF_TWO] = powers[0]["top1"]
    return summary


def _draw(part: str, table: Sequence[Row]) -> Drawing:
    """A curve over ratios or bits for each model."""
    name, title, xlabel = FIGURES[part]
    figure, (axis,) = panels()
    axis.set(xlabel=xlabel, ylabel="top-1 accuracy (%)")
    rows_of_net: dict[str, list[Row]] = defaultdict(list)
    for row in table:
        rows_of_net[row["net"]].append(row)
    curves = []
    for i, (label, rows) in enumerate(rows_of_net.items()):
        xs = [row["ratio"] or min(row["bits"], FLOAT_AT) for row in rows]
        axis.plot(
            xs,
            [row["top-1 (%)"] for row in rows],
            "-o",
            color=PALETTE[i % len(PALETTE)],
            markersize=3.5,
            linewidth=1.4,
            label=label,
        )
        values = ", ".join(f"{row['top-1 (%)']:.1f} % at {_tick(row)}" for row in rows)
        curves.append(f"{label}: {values}")
        if part == BITS:
            axis.set_xticks(xs, list(map(_tick, rows)))
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return Drawing(name, title, f"{title}. {'; '.join(curves)}.", figure)


def _tick(row: Row) -> str:
    """The ratio or the bits of a row."""
    if row["bits"] == FLOAT_BITS:
        return "float"
    return f"{row['ratio'] or row['bits']:g}"
