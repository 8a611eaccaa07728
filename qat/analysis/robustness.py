"""Accuracy of a model if its weights get other step sizes or bit-widths.

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
    all_float,
    block_weights,
    nearest_power_of_two,
    requantize_weights,
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
# For each part that has a figure: file name, title, and label of the x axis.
FIGURES = {
    STEPS: (
        "step_sizes",
        "Accuracy when all step sizes of the weights change",
        "factor on the step sizes",
    ),
    BITS: ("bit_widths", "Accuracy at other bit-widths of the weights", "bits of the weights"),
}
FLOAT_POSITION = 10  # position of float weights (32 bits) on the axis of bits


@dataclass(frozen=True)
class Robustness(Analysis):
    """The settings of `analysis/robustness.yaml`.

    Attributes:
        parts: parts to run: `steps` (factors on all step sizes), `bits` (other bit-widths) and
            `power_of_two` (step sizes rounded to powers of two); None = all parts that the model
            allows.
        low: lowest factor of the step sizes.
        high: highest factor of the step sizes.
        ratios: number of factors, evenly spaced from `low` to `high`, at least 2; the factor 1 is
            added if it is missing.
        bits: bit-widths of the weights to evaluate; 32 = float.
        steps_from: rule for step sizes at other bit-widths, one of `STEPS_FROM`.
        float_bits: bits to which a float model is quantized for the parts `steps` and
            `power_of_two`; None = skip these parts, or raise an error if `parts` names one.
        float_scales: whether float weights get one step size per `channel` or per `tensor`.

    Raises:
        UsageError: a setting has a value that is not allowed.
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
        if self.parts is not None:
            for part in check_list("analysis.parts", self.parts):
                check_choice("analysis.parts", part, PARTS)
        for bits in check_list("analysis.bits", self.bits):
            check_bits("analysis.bits", bits, quantizer="float")  # which also allows 32
        check_number("analysis.low", self.low, 0, exclusive_lowest=True)
        check_number("analysis.high", self.high, self.low, exclusive_lowest=True)
        check_int("analysis.ratios", self.ratios, 2)
        check_choice("analysis.steps_from", self.steps_from, STEPS_FROM)
        if self.float_bits is not None:
            check_bits("analysis.float_bits", self.float_bits)
        check_choice("analysis.float_scales", self.float_scales, tuple(FLOAT_SCALES))

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Compute the requested parts for each model, with a curve for `steps` and for `bits`.

        Raises:
            UsageError: a requested part needs `float_bits` for a float model, or a model has no
                weights on a uniform grid besides stem and heads.
        """
        summary: dict[str, Any] = {}
        table: list[Row] = []
        points_by_model = [self._points(studied_net) for studied_net in nets]
        for studied_net, points in zip(nets, points_by_model, strict=True):
            rows = measure(points, images)
            summary[studied_net.label] = _summarize(rows)
            for row in rows:
                table.append(_rename_columns(row))
        drawings = []
        for part in FIGURES:
            rows = _rows_of(part, table)
            if rows:
                drawings.append(_draw_curves(part, rows))
        title = "Accuracy with other step sizes and bit-widths of the weights"
        return Outcome(summary, [Table("robustness", title, table)], drawings)

    def _points(self, studied_net: StudiedNet) -> list[EvaluationPoint]:
        """The points to evaluate: first the unchanged model, then the points of each part."""
        float_axis = FLOAT_SCALES[self.float_scales]
        net, weights = weight_sites(studied_net.net, studied_net.input_size, float_axis)
        blocks = block_weights(weights)
        if not blocks:
            raise UsageError(
                f"analysis=robustness: {studied_net.label} has no weights on a uniform grid "
                "besides stem and heads; choose another analysis"
            )
        parts = set(self.parts or PARTS)
        # Step sizes are changed in a quantized model, so a float model is quantized first.
        sites = [site for site in weights if site.bits != FLOAT_BITS]
        float_change: dict[str, Any] = {}
        if all_float(weights) and self.float_bits is not None:
            sites = blocks
            float_change = {"bits": self.float_bits, "steps_from": self.steps_from}
        elif not sites:
            if self.parts is not None and parts != {BITS}:
                raise UsageError(
                    f"analysis.parts={self.parts}: {studied_net.label} has no quantized weights; "
                    "set analysis.float_bits, e.g. to 4"
                )
            parts = {BITS}

        def make_point(
            part: str,
            changed_sites: Sequence[WeightSite] = (),
            *,
            ratio: float | None = None,
            width: float | None = None,
            **change: Any,
        ) -> EvaluationPoint:
            key = {"net": studied_net.label, "part": part, "ratio": ratio, "bits": width}
            return EvaluationPoint(
                key, net, functools.partial(requantize_weights, changed_sites, **change)
            )

        points = [make_point("clean", width=_mean_bits(blocks))]
        if STEPS in parts:
            for ratio in self._all_ratios():
                resize = functools.partial(operator.mul, ratio)
                points.append(make_point(STEPS, sites, ratio=ratio, **float_change, resize=resize))
        if BITS in parts:
            for bits in sorted(self.bits):
                # Weights that already have this number of bits keep their own step sizes.
                other_sites = [site for site in blocks if site.bits != bits]
                points.append(
                    make_point(BITS, other_sites, width=bits, bits=bits, steps_from=self.steps_from)
                )
        if POWER_OF_TWO in parts:
            points.append(
                make_point(POWER_OF_TWO, sites, **float_change, resize=nearest_power_of_two)
            )
        return points

    def _all_ratios(self) -> list[float]:
        """Factors on the step sizes in ascending order, including 1."""
        ratios = {1.0}
        for ratio in torch.linspace(self.low, self.high, self.ratios, dtype=torch.float64).tolist():
            ratios.add(float(f"{ratio:.6g}"))
        return sorted(ratios)


def _mean_bits(sites: Sequence[WeightSite]) -> float:
    """Mean bits of all weights, as an int if the mean is an integer."""
    total_bits = 0
    num_weights = 0
    for site in sites:
        total_bits += site.bits * site.shape.numel()
        num_weights += site.shape.numel()
    bits = total_bits / num_weights
    return bits if bits % 1 else int(bits)


def _rename_columns(row: Row) -> Row:
    """Rename the keys of a row to the column names of the table."""
    return {"top-1 (%)" if name == "top1" else name: value for name, value in row.items()}


def _rows_of(part: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Summarize the curves of one model."""
    summary: dict[str, Any] = {"top1": rows[0]["top1"], "bits": rows[0]["bits"]}
    step_rows = _rows_of(STEPS, rows)
    if step_rows:
        worst_row = min(step_rows, key=operator.itemgetter("top1"))
        top1_at = {row["ratio"]: row["top1"] for row in step_rows}
        summary[STEPS] = {
            "at_1": top1_at[1],
            "lowest": worst_row["top1"],
            "lowest_at": worst_row["ratio"],
            "mean": statistics.fmean(top1_at.values()),
        }
    bit_rows = _rows_of(BITS, rows)
    if bit_rows:
        summary["widths"] = {_tick_label(row): row["top1"] for row in bit_rows}
    power_rows = _rows_of(POWER_OF_TWO, rows)
    if power_rows:
        summary[POWER_OF_TWO] = power_rows[0]["top1"]
    return summary


def _draw_curves(part: str, table: Sequence[Row]) -> Drawing:
    """Draw a curve over ratios or bits for each model."""
    name, title, xlabel = FIGURES[part]
    figure, (panel,) = panels()
    panel.set(xlabel=xlabel, ylabel="top-1 accuracy (%)")
    rows_of_net: dict[str, list[Row]] = defaultdict(list)
    for row in table:
        rows_of_net[row["net"]].append(row)
    curves = []
    for i, (label, rows) in enumerate(rows_of_net.items()):
        # Float weights have 32 bits, so `min` puts them at `FLOAT_POSITION`.
        xs = [row["ratio"] or min(row["bits"], FLOAT_POSITION) for row in rows]
        panel.plot(
            xs,
            [row["top-1 (%)"] for row in rows],
            "-o",
            color=PALETTE[i % len(PALETTE)],
            markersize=3.5,
            linewidth=1.4,
            label=label,
        )
        values = ", ".join(f"{row['top-1 (%)']:.1f} % at {_tick_label(row)}" for row in rows)
        curves.append(f"{label}: {values}")
        if part == BITS:
            panel.set_xticks(xs, list(map(_tick_label, rows)))
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return Drawing(name, title, f"{title}. {'; '.join(curves)}.", figure)


def _tick_label(row: Row) -> str:
    """Text for the ratio or the bits of a row."""
    if row["bits"] == FLOAT_BITS:
        return "float"
    return f"{row['ratio'] or row['bits']:g}"
