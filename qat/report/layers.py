"""One table of all layers, from what several analyses know of each."""

from __future__ import annotations

from collections.abc import Iterator

from qat.report.numbers import number
from qat.report.run_files import Row, RunFiles

# Analyses, their tables of layers, and the column that names a layer there.
SOURCES = (("weights", "weights.csv", "layer"), ("cost", "cost_modules.csv", "module"))
OSCILLATING = "oscillating, %"
# What is shown, and the heading; the files have more.
COLUMNS = {
    "layer": "layer",
    "kind": "kind",
    "bits": "bits",
    "bits of operands": "operands, bits",
    "bytes": "bytes",
    "MACs": "MACs",
    "bit operations": "bit operations",
    "kurtosis": "kurtosis",
    "unused levels": "unused levels",
    "at the end codes, %": "saturated, %",
    "SNR (dB)": "SNR, dB",
    OSCILLATING: OSCILLATING,
}
DECIMALS = {"kurtosis": 2, "at the end codes, %": 2, "SNR (dB)": 1, OSCILLATING: 2}


def layer_rows(run: RunFiles) -> list[Row]:
    """A row for each layer and role: what the analyses of the weights and of the cost say of it, and how much of it oscillates."""
    merged: dict[tuple[str, str], Row] = {}
    for layer, role, row in _entries(run):
        same = next((key for key in merged if key[0] == layer and (not role or not key[1] or role == key[1])), (layer, role))
        held = merged.setdefault(same, {"layer": layer})
        held.update({name: value for name, value in row.items() if held.get(name) in {None, ""}})
    kept = [name for name in COLUMNS if any(row.get(name) not in {None, ""} for row in merged.values())]
    return [{COLUMNS[name]: _cell(name, row.get(name, "")) for name in kept} for row in merged.values()]


def used_files(run: RunFiles) -> set[str]:
    """Tables that are part of this one, and need not be shown again."""
    return {file for name, file, _ in SOURCES if _rows(run, name, file)}


def _entries(run: RunFiles) -> Iterator[tuple[str, str, Row]]:
    for name, file, place in SOURCES:
        for row in _rows(run, name, file):
            yield str(row.get(place, "")), str(row.get("role", "")), row
    for row in run.oscillation:
        weights, oscillating = number(row.get("weights")), number(row.get("oscillating"))
        if weights and oscillating is not None:
            yield str(row.get("layer", "")), str(row.get("role", "")), {OSCILLATING: 100 * oscillating / weights}


def _cell(name: str, value: object) -> object:
    """The same number of decimals in all rows of a column."""
    return f"{value:,.{DECIMALS[name]}f}" if name in DECIMALS and isinstance(value, float) else value


def _rows(run: RunFiles, name: str, file: str) -> list[Row]:
    """Rows of a table, none where it is not there or is of several models."""
    analysis = run.analysis(name)
    rows = analysis and analysis.rows(file)
    return rows if rows and len({row.get("net") for row in rows}) == 1 else []
