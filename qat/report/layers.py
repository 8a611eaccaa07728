"""One table of all layers, from what several analyses know of each."""

from __future__ import annotations

from collections.abc import Iterator

from qat.report.files import RunFiles
from qat.report.html import Html, element, joined
from qat.report.numbers import number
from qat.report.tables import table

# Analyses, their tables of layers, and the columns that name a layer there.
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

Row = dict[str, object]


def layer_rows(run: RunFiles) -> list[Row]:
    """A row a layer and role: what the analyses of the weights and of the cost say of it, and how much of it oscillates."""
    merged: dict[tuple[str, str], Row] = {}
    for layer, role, row in _entries(run):
        same = next((key for key in merged if key[0] == layer and (not role or not key[1] or role == key[1])), (layer, role))
        held = merged.setdefault(same, {"layer": layer})
        held.update({name: value for name, value in row.items() if held.get(name) in {None, ""}})
    return list(merged.values())


def layers_table(run: RunFiles) -> Html | None:
    """The same as a table to sort; None where nothing is known."""
    rows = layer_rows(run)
    kept = [name for name in COLUMNS if any(row.get(name) not in {None, ""} for row in rows)]
    shown: list[Row] = [{COLUMNS[name]: _cell(name, row.get(name, "")) for name in kept} for row in rows]
    caption = f"{len(rows)} layers. A click on the name of a column sorts by it."
    return table(caption, shown, sortable=True, ident="layers-caption") if rows else None


def used_files(run: RunFiles) -> set[str]:
    """Tables that are in the one of the layers, and need not be shown again."""
    return {file for name, file, _ in SOURCES if _rows(run, name, file)}


def _entries(run: RunFiles) -> Iterator[tuple[str, str, Row]]:
    for name, file, place in SOURCES:
        for row in _rows(run, name, file):
            yield row.get(place, ""), row.get("role", ""), dict(row)
    for row in run.oscillation:
        weights, swinging = number(row.get("weights")), number(row.get("oscillating"))
        if weights and swinging is not None:
            yield row.get("layer", ""), row.get("role", ""), {"role": row.get("role", ""), OSCILLATING: f"{100 * swinging / weights:.2f}"}


def _cell(name: str, value: object) -> object:
    """Digits that one column has in all rows; kinds of layers do not break."""
    found = number(value)
    if name in DECIMALS and found is not None:
        return joined([f"{found:,.{DECIMALS[name]}f}"])
    return element("span", str(value), class_="whole") if name == "kind" else value


def _rows(run: RunFiles, name: str, file: str) -> list[dict[str, str]]:
    """Rows of a table, none where it is not there or is of several nets."""
    study = run.study(name)
    if study is None or not (study.folder / file).is_file():
        return []
    rows = study.rows(file)
    return [] if len({row.get("net") for row in rows}) > 1 else rows
