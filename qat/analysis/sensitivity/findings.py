"""What follows from evaluations of a net's parts: tables, figures in words, suggested bits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qat.analysis.analysis import Advice, Drawing, Outcome, Row, Table
from qat.analysis.sensitivity.drawings import PartFigures, draw_bars, draw_bits, draw_mixes
from qat.analysis.sensitivity.mix import Mix, as_setting
from qat.analysis.sensitivity.parts import Part, TakenApart

log = logging.getLogger(__name__)
AS_IS, FLOAT, ONLY, WITHOUT, BITS, SUGGESTED, UNIFORM = "as it is", "float", "only", "without", "bits", "suggested", "uniform"
Mixes = Sequence[tuple[Mapping[str, Any], Mix]]


class SensitivityResults:
    """Evaluations by what was evaluated.

    Args:
        rows: some of them may be missing.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {self._key(row): row for row in rows}

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("net", "measure", "part", "bits", "budget_mb"))

    def row(self, label: str, measure: str, **key: Any) -> Row | None:
        """One evaluation."""
        return self._rows.get(self._key({"net": label, "measure": measure, **key}))

    def change(self, label: str, base: str, measure: str, figure: str, **key: Any) -> float | None:
        """By how much `loss` or `top1` is above that of `base`."""
        before, row = self.row(label, base), self.row(label, measure, **key)
        return None if before is None or row is None else float(row[figure] - before[figure])

    def rise(self, label: str, part: Part, bits: int, figure: str = "loss") -> float | None:
        """What other bits of one part add to the loss, or to top-1, of the net as it is; nothing for the bits that it has."""
        if bits == part.bits:
            return None if self.row(label, AS_IS) is None else 0.0
        return self.change(label, AS_IS, BITS, figure, part=part.name, bits=bits)


def sensitivity_outcome(
    taken: Sequence[tuple[str, TakenApart]], findings: SensitivityResults, widths: Sequence[int], mixes: Mapping[str, Mixes]
) -> Outcome:
    """All that an analysis of sensitivity leaves.

    Args:
        taken: label and parts of each net.
        findings: what was measured.
        widths: bits that were tried.
        mixes: suggestions and equal bits by label, with their keys.
    """
    summary: dict[str, Any] = {}
    rows: list[Row] = []
    chosen: list[Row] = []
    drawings: list[Drawing] = []
    for number, (label, apart) in enumerate(taken):
        figures = [_figures(label, part, findings, widths) for part in apart.parts]
        rows += [figure.as_row(label) for figure in figures]
        suggestions = _suggestions(label, apart, findings, mixes[label])
        picked = next((mix for key, mix in mixes[label] if key["measure"] == SUGGESTED), None)
        ending = f"-{number + 1}" if len(taken) > 1 else ""
        drawn = (
            draw_bars(label, figures, f"sensitivity{ending}"),
            draw_bits(label, figures, widths, picked, f"sensitivity_bits{ending}"),
        )
        drawings += [drawing for drawing in drawn if drawing is not None]
        summary[label] = _summary(label, figures, findings, suggestions)
        # Without what is no single figure; the bits of the parts are in the setting.
        chosen += [{"net": label, **{k: v for k, v in entry.items() if k != "bits_of_parts"}} for entry in suggestions]
    mixed = draw_mixes(chosen, [label for label, _ in taken])
    drawings += [mixed] if mixed else []
    tables = [Table("sensitivity", "Parts and what their quantization costs", rows)]
    if chosen:
        tables.append(Table("mixed_precision", "Bits under a size, and equal bits everywhere", chosen))
    return Outcome(summary, tables, drawings, _warnings(taken))


def _figures(label: str, part: Part, findings: SensitivityResults, widths: Sequence[int]) -> PartFigures:
    without = [findings.change(label, AS_IS, WITHOUT, figure, part=part.name) for figure in ("loss", "top1")]
    return PartFigures(
        name=part.name,
        quantizers=len(part.sites),
        weights=sum(weight.numel for weight in part.weights),
        bits=part.bits,
        only=(
            findings.change(label, FLOAT, ONLY, "loss", part=part.name),
            findings.change(label, FLOAT, ONLY, "top1", part=part.name),
        ),
        without=(without[0], without[1]),
        widths={bits: (findings.rise(label, part, bits), findings.rise(label, part, bits, "top1")) for bits in widths if part.weights},
    )


def _suggestions(label: str, apart: TakenApart, findings: SensitivityResults, mixes: Mixes) -> list[dict[str, Any]]:
    base = findings.row(label, AS_IS)
    found = []
    for key, mix in mixes:
        names = {name: value for name, value in key.items() if name != "measure"}
        row = findings.row(label, str(key["measure"]), **names) or {}
        entry: dict[str, Any] = {"choice": key["measure"], **names, "size_bytes": mix.size_bytes}
        if key["measure"] == SUGGESTED:
            entry["expected_loss"] = None if base is None else base["loss"] + mix.rise
        entry |= {"loss": row.get("loss"), "top1": row.get("top1")}
        if key["measure"] == SUGGESTED:
            entry |= {"bits_of_parts": dict(mix.bits), "setting": as_setting(apart, mix.bits)}
            if row:
                log.info(
                    "%s within %s MB: %d bytes, loss %.4f (%.4f if losses added up), top-1 %.2f %%:\n'%s'",
                    *(label, key["budget_mb"], mix.size_bytes, row["loss"], entry["expected_loss"], row["top1"], entry["setting"]),
                )
        found.append(entry)
    return found


def _summary(
    label: str, figures: Sequence[PartFigures], findings: SensitivityResults, suggestions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    bases = {name: findings.row(label, name) for name in (AS_IS, FLOAT)}
    found: dict[str, Any] = {
        name.replace(" ", "_"): {figure: row[figure] for figure in ("top1", "loss")} for name, row in bases.items() if row is not None
    }
    for name in (ONLY, WITHOUT):
        known = [(part.name, change) for part in figures if (change := getattr(part, name)[0]) is not None]
        if known:
            # Left in float, the part that costs most lowers the loss most.
            worst, change = max(known, key=lambda entry: entry[1] if name == ONLY else -entry[1])
            found[f"most_sensitive_{name}"] = {"part": worst, "loss_change": change}
    return found | ({"suggestions": list(suggestions)} if suggestions else {})


def _warnings(taken: Sequence[tuple[str, TakenApart]]) -> list[Advice]:
    found = []
    for label, apart in taken:
        for name in apart.weights.left_alone:
            found.append(
                Advice(f"{label}: {name}", "nothing is known of its weight quantizer", "its bits were not changed, and are not suggested")
            )
        held = [part for part in apart.parts if part.fixed and part.weights]
        for reason in dict.fromkeys(part.fixed for part in held):
            names = ", ".join(part.name for part in held if part.fixed == reason)
            found.append(Advice(f"{label}: {names}", reason, "a suggestion leaves the bits of its weights as they are"))
    return found
