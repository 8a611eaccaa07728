"""How much of its accuracy a net keeps when its weights get other step sizes or bit-widths than it was trained or calibrated for.

Protocol: KURE, arXiv 2002.07686. Conventions: docs/analysis.md, section Robustness.
"""

from __future__ import annotations

import functools
import operator
import statistics
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

STEPS, BITS, POWER_OF_TWO = PARTS = ("steps", "bits", "power_of_two")
FLOAT_SCALES = {"channel": 0, "tensor": None}
# Name, title, axis.
FIGURES = {
    STEPS: (
        "step_sizes",
        "Accuracy when all step sizes of the weights change",
        "step size, as a multiple of its own",
    ),
    BITS: ("bit_widths", "Accuracy at other bit-widths of the weights", "bits of the weights"),
}
FLOAT_AT = 10  # where float stands on an axis of bits


@dataclass(frozen=True)
class Robustness(Analysis):
    """The settings of `analysis/robustness.yaml`.

    Attributes:
        parts: some of `PARTS`; None = all that a net allows.
        low: lowest factor on the step sizes.
        high: highest.
        ratios: how many factors, evenly spaced, both ends among them; 1 is added to them.
        bits: widths of the weights, 32 = float.
        steps_from: where step sizes at other widths come from, one of `STEPS_FROM`.
        float_bits: width to which float nets are quantized for `steps` and `power_of_two`; None = those are left out.
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
        check_number("analysis.low", self.low, 0, above=True)
        check_number("analysis.high", self.high, self.low, above=True)
        check_int("analysis.ratios", self.ratios, 2)
        check_choice("analysis.steps_from", self.steps_from, STEPS_FROM)
        if self.float_bits is not None:
            check_bits("analysis.float_bits", self.float_bits)
        check_choice("analysis.float_scales", self.float_scales, tuple(FLOAT_SCALES))

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """The two curves of each net, their numbers, and the accuracy with powers of two.

        Raises:
            UsageError: a part that was requested by name needs quantized weights, and a net has none; or no grid of its blocks is uniform.
        """
        summary: dict[str, Any] = {}
        table: list[Row] = []
        points = [self._points(studied) for studied in nets]
        for studied, of_net in zip(nets, points, strict=True):
            rows = measure(of_net, images)
            steps, widths, powers = ([row for row in rows if row["part"] == part] for part in PARTS)
            found: dict[str, Any] = {"top1": rows[0]["top1"], "bits": rows[0]["bits"]}
            if steps:
                worst, percents = (
                    min(steps, key=operator.itemgetter("top1")),
                    {row["ratio"]: row["top1"] for row in steps},
                )
                mean = statistics.fmean(percents.values())
                found[STEPS] = {
                    "at_1": percents[1],
                    "lowest": worst["top1"],
                    "lowest_at": worst["ratio"],
                    "mean": mean,
                }
            if widths:
                found["widths"] = {_place(row): row["top1"] for row in widths}
            if powers:
                found[POWER_OF_TWO] = powers[0]["top1"]
            summary[studied.label] = found
            table += [
                {"top-1 (%)" if name == "top1" else name: value for name, value in row.items()}
                for row in rows
            ]
        drawings = [
            _draw(part, rows)
            for part in FIGURES
            if (rows := [row for row in table if row["part"] == part])
        ]
        return Outcome(
            summary,
            [
                Table(
                    "robustness",
                    "Accuracy with other step sizes and bit-widths of the weights",
                    table,
                )
            ],
            drawings,
        )

    def _points(self, studied: StudiedNet) -> list[EvaluationPoint]:
        """The net as it is, then part by part."""
        net, weights = weight_sites(
            studied.net, studied.input_size, FLOAT_SCALES[self.float_scales]
        )
        blocks = in_blocks(weights)
        if not blocks:
            raise UsageError(
                f"analysis=robustness: {studied.label} has no weights in blocks on a uniform grid"
            )
        # What all changes of step sizes start from: the quantized weights of the net, or those of a float net quantized here.
        base: dict[str, Any] = {}
        sites, parts = (
            [site for site in weights if site.bits != FLOAT_BITS],
            {*(self.parts or PARTS)},
        )
        if is_float(weights) and self.float_bits is not None:
            sites, base = blocks, {"bits": self.float_bits, "steps_from": self.steps_from}
        elif not sites:
            if self.parts is not None and parts != {BITS}:
                raise UsageError(
                    f"analysis.parts={self.parts}: {studied.label} has no quantized weights; set analysis.float_bits, e.g. to 4"
                )
            parts = {BITS}

        def point(
            part: str,
            of: Sequence[WeightSite] = (),
            *,
            ratio: float | None = None,
            width: float | None = None,
            **change: Any,
        ) -> EvaluationPoint:
            key = {"net": studied.label, "part": part, "ratio": ratio, "bits": width}
            return EvaluationPoint(key, net, functools.partial(changed, of, **change))

        width = sum(site.bits * site.shape.numel() for site in blocks) / sum(
            site.shape.numel() for site in blocks
        )
        points = [point("clean", width=width if width % 1 else int(width))]
        if STEPS in parts:
            ratios = torch.linspace(self.low, self.high, self.ratios, dtype=torch.float64).tolist()
            for ratio in sorted({1.0, *(float(f"{value:.6g}") for value in ratios)}):
                points.append(
                    point(
                        STEPS,
                        sites,
                        ratio=ratio,
                        **base,
                        resize=functools.partial(operator.mul, ratio),
                    )
                )
        for bits in sorted(self.bits) if BITS in parts else ():
            others = [
                site for site in blocks if site.bits != bits
            ]  # a weight of this width keeps its trained step sizes
            points.append(point(BITS, others, width=bits, bits=bits, steps_from=self.steps_from))
        if POWER_OF_TWO in parts:
            points.append(point(POWER_OF_TWO, sites, **base, resize=nearest_power_of_two))
        return points


def _draw(part: str, table: Sequence[Row]) -> Drawing:
    """A curve of each net over ratios or bits."""
    (drawn, (axis,)), said = panels(), []
    name, title, xlabel = FIGURES[part]
    axis.set(xlabel=xlabel, ylabel="top-1 accuracy (%)")
    for number, label in enumerate(dict.fromkeys(row["net"] for row in table)):
        rows = [row for row in table if row["net"] == label]
        places = [row["ratio"] or min(row["bits"], FLOAT_AT) for row in rows]
        percents, names = [row["top-1 (%)"] for row in rows], [_place(row) for row in rows]
        axis.plot(
            places,
            percents,
            "-o",
            color=PALETTE[number % len(PALETTE)],
            markersize=3.5,
            linewidth=1.4,
            label=label,
        )
        said.append(
            f"{label}: "
            + ", ".join(
                f"{percent:.1f} % at {name}" for percent, name in zip(percents, names, strict=True)
            )
        )
        if part == BITS:
            axis.set_xticks(places, names)
    drawn.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return Drawing(name, title, f"{title}. {'; '.join(said)}.", drawn)


def _place(row: Row) -> str:
    return "float" if row["bits"] == FLOAT_BITS else f"{row['ratio'] or row['bits']:g}"
