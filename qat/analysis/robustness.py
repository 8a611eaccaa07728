"""How much of its accuracy a net keeps when its weights get other step sizes or bit-widths than it was trained or calibrated for.

Protocol: KURE, arXiv 2002.07686. Conventions: docs/analysis.md, section Robustness.
"""

from __future__ import annotations

import functools
import logging
import operator
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qat.analysis.analysis import Analysis, Drawing, EvaluationPoint, Outcome, Row, StudiedNet, Table
from qat.analysis.images import ImageSet
from qat.analysis.requantize import STEPS_FROM, GridSite, WeightSites, changed, nearest_power_of_two, weight_sites
from qat.analysis.runner import measure
from qat.analysis.style import axes, colours, figure
from qat.errors import UsageError
from qat.utils.validate import FLOAT_BITS, check_bits, check_choice, check_int, check_number

log = logging.getLogger(__name__)
CLEAN, QUANTIZED = "clean", "quantized"
STEPS, BITS, POWER_OF_TWO = PARTS = ("steps", "bits", "power_of_two")
FLOAT_SCALES = {"channel": 0, "tensor": None}
# Where float stands on an axis of bits.
_FLOAT_AT = 10

# Percent at the step sizes or width of the net as it is; and all over ratios or bits, in their order.
StarAndCurve = tuple[tuple[float, float], list[tuple[float, float]]]


@dataclass(frozen=True)
class Robustness(Analysis):
    """The settings of `analysis/robustness.yaml`.

    Attributes:
        parts: some of `PARTS`; None = all that a net allows.
        low: lowest factor on the step sizes.
        high: highest.
        ratios: how many factors, evenly spaced, both ends among them.
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
        for setting, value in (("parts", PARTS if self.parts is None else self.parts), ("bits", self.bits)):
            if not isinstance(value, list | tuple) or not value:
                raise UsageError(f"analysis.{setting}={value!r}: must be a list")
        for part in self.parts or ():
            check_choice("analysis.parts", part, PARTS)
        for bits in self.bits:
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
            UsageError: a part that was requested by name needs quantized weights, and a net has none.
        """
        points = [self._points(studied) for studied in nets]
        summary: dict[str, Any] = {}
        table: list[Row] = []
        by_ratio: dict[str, StarAndCurve] = {}
        by_bits: dict[str, StarAndCurve] = {}
        for studied, of in zip(nets, points, strict=True):
            rows = measure(of, images)
            label, clean = studied.label, rows[0]
            of_part = {part: [row for row in rows if row["part"] == part] for part in (CLEAN, QUANTIZED, *PARTS)}
            reference = (of_part[QUANTIZED] or [clean])[0]
            if of_part[STEPS] and 1 in self.factors():
                of_part[STEPS] = sorted([*of_part[STEPS], {**reference, "ratio": 1.0, "bits": None}], key=lambda row: row["ratio"])
            if of_part[BITS] and clean["bits"] in {*self.bits} - {row["bits"] for row in of_part[BITS]}:
                of_part[BITS].append(clean)
            of_part[BITS].sort(key=lambda row: row["bits"])
            for part, row in ((part, row) for part, some in of_part.items() for row in some):
                key = {"net": label, "part": part, "ratio": row.get("ratio"), "bits": row.get("bits")}
                table.append({**key, "top-1 (%)": row["top1"], "loss": row["loss"]})

            found = {"top1": clean["top1"], "bits": clean["bits"] or None}
            if reference is not clean:
                found["top1_quantized"] = reference["top1"]
            if curve := [(row["ratio"], row["top1"]) for row in of_part[STEPS]]:
                lowest_at, lowest = min(curve, key=lambda point: point[1])
                mean = statistics.fmean(top1 for _, top1 in curve)
                found["steps"] = {"at_1": reference["top1"], "lowest": lowest, "lowest_at": lowest_at, "mean": mean}
                by_ratio[label] = (1.0, reference["top1"]), curve
            if curve := [(row["bits"], row["top1"]) for row in of_part[BITS]]:
                found["widths"] = {_named(bits): top1 for bits, top1 in curve}
                by_bits[label] = (clean["bits"], clean["top1"]), curve
            for row in of_part[POWER_OF_TWO]:
                found[POWER_OF_TWO] = row["top1"]
            summary[label] = found

        drawings = []
        if by_ratio:
            title = "Accuracy when all step sizes of the weights change (star: no change)"
            drawings.append(_draw("step_sizes", title, "step size of the weights, as a multiple of its own", by_ratio))
        if by_bits:
            title = "Accuracy at other bit-widths of the weights (star: no change)"
            drawings.append(_draw("bit_widths", title, "bits of the weights", by_bits))
        return Outcome(summary, [Table("robustness", "Accuracy with other step sizes and bit-widths of the weights", table)], drawings)

    def factors(self) -> list[float]:
        """The factors on the step sizes, as the table has them."""
        return [round(value, 6) for value in torch.linspace(float(self.low), float(self.high), self.ratios, dtype=torch.float64).tolist()]

    def _points(self, studied: StudiedNet) -> list[EvaluationPoint]:
        """The net as it is, then part by part."""
        weights = weight_sites(studied.net, studied.input_size, FLOAT_SCALES[self.float_scales])
        if weights.left_alone:
            log.warning("%s: no grid is known of %s; these weights stay as they are", studied.label, ", ".join(weights.left_alone))
        resized = _resized(weights)
        # What all changes of step sizes start from: the quantized weights of the net, or those of a float net quantized here.
        is_quantized_here = weights.is_float and self.float_bits is not None
        sites = resized if is_quantized_here else weights.sites
        base: dict[str, Any] = {"bits": self.float_bits, "steps_from": self.steps_from} if is_quantized_here else {}
        parts = set(self.parts or PARTS)
        if not is_quantized_here and all(site.grid.bits == FLOAT_BITS for site in sites):
            if self.parts is not None and parts != {BITS}:
                needs = "no quantized weights on a known grid; analysis.float_bits=4 quantizes those of a float net"
                raise UsageError(f"analysis.parts={list(self.parts)}: {studied.label} has {needs}")
            parts &= {BITS}

        def point(part: str, of: Sequence[GridSite] = (), key: Mapping[str, float] | None = None, **change: Any) -> EvaluationPoint:
            context = functools.partial(changed, of, **change)
            return EvaluationPoint({"net": studied.label, "part": part, **(key or {})}, weights.net, context)

        width = sum(site.grid.bits * site.shape.numel() for site in resized) / max(sum(site.shape.numel() for site in resized), 1)
        points = [point(CLEAN, key={"bits": width if width % 1 else int(width)})]
        if is_quantized_here and parts != {BITS}:
            points.append(point(QUANTIZED, sites, **base))
        if STEPS in parts:
            ratios = [ratio for ratio in self.factors() if ratio != 1]
            points += [point(STEPS, sites, {"ratio": ratio}, **base, resize=functools.partial(operator.mul, ratio)) for ratio in ratios]
        for bits in self.bits if BITS in parts else ():
            # A weight of this width keeps its trained step sizes.
            if others := [site for site in resized if site.grid.bits != bits]:
                points.append(point(BITS, others, {"bits": bits}, bits=bits, steps_from=self.steps_from))
        if POWER_OF_TWO in parts:
            points.append(point(POWER_OF_TWO, sites, **base, resize=nearest_power_of_two))
        return points


def _resized(weights: WeightSites) -> tuple[GridSite, ...]:
    """Weights whose width is changed: those of blocks, and of stem and heads where a net quantizes them to the width of its blocks."""
    blocks = {site.grid.bits for site in weights.sites if site.place == "block"}
    if weights.is_float:
        return tuple(site for site in weights.sites if site.place == "block")
    quantized = [site for site in weights.sites if site.grid.bits != FLOAT_BITS]  # float by the recipe: stays
    return tuple(site for site in quantized if site.place == "block" or blocks == {site.grid.bits})


def _draw(name: str, title: str, xlabel: str, nets: Mapping[str, StarAndCurve]) -> Drawing:
    drawn = figure()
    axis = axes(drawn, xlabel, "top-1 accuracy (%)")
    words = []
    for (label, (star, curve)), colour in zip(nets.items(), colours(), strict=False):
        xs, percents = zip(*curve, strict=True)
        axis.plot([_place(x) for x in xs], percents, "-o", color=colour, markersize=3.5, linewidth=1.4, label=label)
        axis.plot(_place(star[0]), star[1], "*", color=colour, markersize=13, markeredgecolor="white", zorder=3)
        lowest = min(percents)
        words.append(f"{label}: {star[1]:.1f} % without a change, lowest {lowest:.1f} % at {_named(xs[percents.index(lowest)])}")
    if name == "bit_widths":
        ticks = sorted({x for _, curve in nets.values() for x, _ in curve})
        axis.set_xticks([_place(x) for x in ticks], [_named(x) for x in ticks])
    low, high = axis.get_ylim()
    axis.set_ylim(max(low - 2, -2), min(high + 2, 102))
    drawn.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return Drawing(name, title, f"{title}. {'; '.join(words)}.", drawn)


def _place(x: float) -> float:
    return _FLOAT_AT if x == FLOAT_BITS else x


def _named(x: float) -> str:
    return "float" if x == FLOAT_BITS else f"{x:g}"
