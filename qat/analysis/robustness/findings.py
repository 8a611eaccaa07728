"""What follows from the evaluations of a robustness analysis: curves and their numbers, tables, pictures. Some rows may be missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qat.analysis.analysis import Advice, Drawing, Outcome, Row, Table
from qat.analysis.robustness import drawings
from qat.analysis.robustness.corruptions import level_of
from qat.analysis.robustness.drawings import Curve, Dot
from qat.analysis.robustness.evaluations import PerturbedNet
from qat.utils.validate import FLOAT_BITS

# What counts as kept: this many points below the accuracy at ratio 1.
TOLERANCE = 2.0
# Steps that have to be met more closely than this are worth a word.
_FRAGILE = 0.1


def curve_numbers(curve: Curve, at_one: float) -> dict[str, float | None]:
    """Numbers of an accuracy over ratios of steps.

    Args:
        curve: (ratio, percent), two at least, ratios ascending.
        at_one: percent at ratio 1.

    Returns:
        `lowest` and `mean` percent, `lowest_at` a ratio; `area` under accuracy / accuracy at 1, over the length of the range: 1 = nothing
        is lost; `width`: length of the set of ratios with at most `TOLERANCE` points less than at 1. Straight lines between ratios.
    """
    pairs = list(zip(curve, curve[1:], strict=False))
    lowest_at, lowest = min(curve, key=lambda point: point[1])
    area = sum((b - a) * (u + v) / 2 for (a, u), (b, v) in pairs) / (curve[-1][0] - curve[0][0])
    return {
        "lowest": lowest,
        "lowest_at": lowest_at,
        "mean": statistics.fmean(value for _, value in curve),
        "area": area / at_one if at_one else None,
        "width": round(sum(_length_above(*one, *other, at_one - TOLERANCE) for one, other in pairs), 6),
    }


def _length_above(a: float, u: float, b: float, v: float, threshold: float) -> float:
    """Length of the part of [a, b] where the line from (a, u) to (b, v) is not below the threshold."""
    low, high = min(u, v), max(u, v)
    if low >= threshold:
        return b - a
    return 0.0 if high < threshold else (b - a) * (high - threshold) / (high - low)


def _measured(row: Row) -> Row:
    return {"top-1 (%)": row["top1"], "loss": row["loss"]}


@dataclass(frozen=True)
class RobustnessResults:
    """Rows, sorted by net and part.

    Attributes:
        nets: in the order of pictures.
        rows: of the evaluations that are done.
        ratios: those that were asked for.
        bits: widths that were asked for.
        severities: of corruptions that were asked for.
    """

    nets: Sequence[PerturbedNet]
    rows: Sequence[Row]
    ratios: Sequence[float]
    bits: Sequence[int]
    severities: Sequence[int]

    def outcome(self, warnings: Sequence[Advice] = ()) -> Outcome:
        """Everything that there is something of."""
        summary = {net.label: self.summary(net) for net in self.nets}
        tables = [table for table in self._tables() if table.rows]
        return Outcome(summary, tables, list(self._drawings()), [*warnings, *self._fragile(summary)])

    def of(self, net: PerturbedNet, part: str) -> list[Row]:
        """Rows of a net and a part."""
        return [row for row in self.rows if row["net"] == net.label and row["part"] == part]

    def single(self, net: PerturbedNet, part: str) -> float | None:
        """Accuracy of a part that is one evaluation."""
        return next((row["top1"] for row in self.of(net, part)), None)

    def reference(self, net: PerturbedNet) -> float | None:
        """Accuracy of the quantized weights without a change."""
        return self.single(net, net.reference)

    def summary(self, net: PerturbedNet) -> dict[str, Any]:
        """All numbers of a net; a part that is missing has none."""
        found: dict[str, Any] = {"top1": self.single(net, "clean"), "bits": net.width}
        if net.reference != "clean":
            found["top1_quantized"] = self.reference(net)
        numbers = {
            "steps": self._step_numbers(net),
            "widths": dict(self._named_widths(net)),
            "power_of_two": self.single(net, "power_of_two"),
            "quantizers": self.policies(net),
            "corruptions": self._corruption_numbers(net),
        }
        return found | {part: value for part, value in numbers.items() if value not in (None, {})}

    def steps(self, net: PerturbedNet) -> list[Row]:
        """Rows by ratio; at 1 nothing is changed."""
        found = self.of(net, "steps")
        same = [{**row, "ratio": 1.0} for row in self.of(net, net.reference)] if found and 1.0 in self.ratios else []
        return sorted([*found, *same], key=lambda row: row["ratio"])

    def step_curve(self, net: PerturbedNet) -> Curve:
        """(ratio, percent)."""
        return [(row["ratio"], row["top1"]) for row in self.steps(net)]

    def _step_numbers(self, net: PerturbedNet) -> dict[str, Any]:
        curve, at_one = self.step_curve(net), self.reference(net)
        if at_one is None or len(curve) < 2:
            return {}
        return {"at_1": at_one, **curve_numbers(curve, at_one), "ratios": len(curve), "ratios_wanted": len(self.ratios)}

    def widths(self, net: PerturbedNet) -> list[Row]:
        """Rows by bits; at the width as trained, if all weights have one, nothing is changed."""
        found = self.of(net, "bits")
        known = {row["bits"] for row in found}
        same = [{**row, "bits": net.width} for row in self.of(net, "clean")] if found and net.width in {*self.bits} - known else []
        return sorted([*found, *same], key=lambda row: row["bits"])

    def width_curve(self, net: PerturbedNet) -> Curve:
        """(bits, percent)."""
        return [(row["bits"], row["top1"]) for row in self.widths(net)]

    def _named_widths(self, net: PerturbedNet) -> Iterator[tuple[str, float]]:
        for bits, top1 in self.width_curve(net):
            yield "float" if bits == FLOAT_BITS else f"{bits:g}", top1

    def policies(self, net: PerturbedNet) -> dict[str, float]:
        """Percent by policy, those with several draws averaged."""
        draws: dict[str, list[float]] = {}
        for row in self.of(net, "quantizers"):
            draws.setdefault(row["policy"], []).append(row["top1"])
        return {policy: statistics.fmean(values) for policy, values in draws.items()}

    def _corruption_numbers(self, net: PerturbedNet) -> dict[str, Any]:
        """Means over kinds and severities, in percent and as a share of the clean accuracy."""
        rows, clean = self.of(net, "corruptions"), self.single(net, "clean")
        if not rows:
            return {}
        kinds = {kind: statistics.fmean(r["top1"] for r in rows if r["kind"] == kind) for kind in dict.fromkeys(r["kind"] for r in rows)}
        mean = statistics.fmean(row["top1"] for row in rows)
        worst = min(kinds, key=lambda kind: kinds[kind])
        return {"mean": mean, "relative": mean / clean if clean else None, "worst": worst, "kinds": kinds}

    def _tables(self) -> Iterator[Table]:
        yield Table("step_sizes", "Accuracy over the ratio of all weight steps", [row for s in self.nets for row in self._step_rows(s)])
        yield Table("bit_widths", "Accuracy over the width of the weights", [row for s in self.nets for row in self._width_rows(s)])
        yield Table("policies", "Accuracy under other quantizers of the weights", [row for s in self.nets for row in self._policy_rows(s)])
        yield Table("corruptions", "Accuracy on corrupted images, by severity", [row for s in self.nets for row in self._damage_rows(s)])

    def _step_rows(self, net: PerturbedNet) -> Iterator[Row]:
        at_one = self.reference(net)
        for row in self.steps(net):
            share = row["top1"] / at_one if at_one else math.nan
            yield {"net": net.label, "ratio": row["ratio"], **_measured(row), "share of ratio 1": share}

    def _width_rows(self, net: PerturbedNet) -> Iterator[Row]:
        for row in self.widths(net):
            yield {"net": net.label, "bits": row["bits"], **_measured(row), "as trained": int(row["part"] == "clean")}

    def policy_dots(self, net: PerturbedNet) -> dict[str, float]:
        """Percent by what is done to the weights, nothing first."""
        found = self.policies(net)
        power, reference = self.single(net, "power_of_two"), self.reference(net)
        if power is not None:
            found = {"steps to powers of two": power, **found}
        return {"none": reference, **found} if found and reference is not None else found

    def _policy_rows(self, net: PerturbedNet) -> Iterator[Row]:
        reference = self.reference(net)
        for policy, top1 in self.policy_dots(net).items():
            draws = [row["top1"] for row in self.of(net, "quantizers") if row["policy"] == policy]
            spread = statistics.stdev(draws) if len(draws) > 1 else 0.0
            change = math.nan if reference is None else top1 - reference
            named = {"net": net.label, "change": policy, "top-1 (%)": top1, "difference (points)": change}
            yield {**named, "draws": max(len(draws), 1), "standard deviation": spread}

    def _damage_rows(self, net: PerturbedNet) -> Iterator[Row]:
        rows, clean = self.of(net, "corruptions"), self.single(net, "clean")
        for kind in dict.fromkeys(row["kind"] for row in rows):
            found = {row["severity"]: row["top1"] for row in rows if row["kind"] == kind}
            mean = statistics.fmean(found.values())
            levels = {f"level {s}": level_of(kind, s, net.side) for s in self.severities}
            percents = {f"severity {s} (%)": found.get(s, math.nan) for s in self.severities}
            shares = {"mean (%)": mean, "share of clean": mean / clean if clean else math.nan}
            yield {"net": net.label, "corruption": kind, **percents, **shares, **levels}

    def _drawings(self) -> Iterator[Drawing]:
        steps = {s.label: (self.step_curve(s), self.reference(s)) for s in self.nets if len(self.step_curve(s)) > 1}
        if steps:
            yield drawings.step_sizes(steps, TOLERANCE)
        widths = {s.label: (self.width_curve(s), s.width, self.single(s, "clean")) for s in self.nets if len(self.width_curve(s)) > 1}
        if widths:
            yield drawings.bit_widths(widths)
        policies = {s.label: {k: [Dot(v)] for k, v in self.policy_dots(s).items()} for s in self.nets if self.policy_dots(s)}
        if policies:
            yield drawings.policies(policies)
        damages = {s.label: self._damage_dots(s) for s in self.nets if self.of(s, "corruptions")}
        if damages:
            yield drawings.corruptions(damages, self.severities)

    def _damage_dots(self, net: PerturbedNet) -> dict[str, list[Dot]]:
        dots: dict[str, list[Dot]] = {}
        clean = self.single(net, "clean")
        if clean is not None:
            dots["none"] = [Dot(clean)]
        for row in self.of(net, "corruptions"):
            dots.setdefault(row["kind"], []).append(Dot(row["top1"], row["severity"]))
        return dots

    def _fragile(self, summary: dict[str, Any]) -> Iterator[Advice]:
        # Of a shorter range than that, no net can keep more than the whole.
        limit = min(_FRAGILE, round(self.ratios[-1] - self.ratios[0], 6))
        for label, found in summary.items():
            steps = found.get("steps", {})
            if steps.get("width", 1) < limit and steps["ratios"] == len(self.ratios):
                what = f"keeps its accuracy within {TOLERANCE:g} points only for steps of a range of {100 * steps['width']:.1f} %"
                yield Advice(label, what, "train with loss.kure, or deploy with the very steps it was trained with")
