"""Write `report.html`, a page about a run or a sweep that loads no other file."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qat.report.figures import (
    bits_of,
    confusion_map,
    data_url,
    format_value,
    parse_number,
    search_figure,
    training_curves,
)
from qat.utils.files import csv_rows, write_text
from qat.utils.text import (
    chance_level_remark,
    format_duration,
    format_si,
    is_inside,
    json_object,
    printable,
    read_file,
)

FILE = "report.html"
# Folder for the analyses that a run makes of its own model.
ANALYSES = "analysis"
# Tables of these analyses that the page shows, each with the columns to show; the files have more
# columns.
LAYERS = {
    "weights.csv": (
        "layer",
        "role",
        "bits",
        "weights",
        "kurtosis",
        "unused levels",
        "at the end codes, %",
        "SNR (dB)",
    ),
    "cost_modules.csv": ("module", "kind", "bits of operands", "bytes", "MACs", "bit operations"),
}
FACTS = ("finished", "device", "seed", "weights", "git_commit")
# Column headings of the table of results, by key in `results.json`.
RESULT_COLUMNS = {
    "top1": "Top-1, %",
    "top5": "Top-5, %",
    "loss": "Loss",
    "size_bytes": "Bytes",
    "bitops": "Bit operations",
}

# Escape HTML and control characters; treat an undefined name as an error.
ENVIRONMENT = Environment(
    loader=PackageLoader("qat.report"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=lambda value: printable(value) if type(value) is str else value,
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.do"],
)

Row = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """Write the page of a run directory, from the files in it.

    Returns:
        The path of the page.
    """
    results = json_object(folder / "results.json", folder)
    record = json_object(folder / "command.json", folder)
    command = str(results.get("command") or record.get("command", "run")).removesuffix(".py")
    names = [results[key] for key in ("model", "quant", "data") if results.get(key)]
    float_cost = _float_cost(folder)
    command_line = None
    if record:
        program = record.get("program") or f"python {command}.py"
        command_line = f"{program} {shlex.join(record['overrides'])}"
    config = None
    if is_inside(folder / "config.yaml", folder):
        config = read_file(folder / "config.yaml").decode(errors="replace")
    context = {
        "kind": command,
        "subject": " · ".join(names) or folder.resolve().name,
        "results": results,
        "note": chance_level_remark(results),
        "figures": _headline_numbers(results, float_cost),
        "rows": _file_rows(results) if command == "export" else _model_rows(results, float_cost),
        "confusion": confusion_map(_table(folder / "confusion.csv", folder)),
        "curves": training_curves(_table(folder / "metrics.csv", folder)),
        "search": search_figure(_table(folder / "search.csv", folder)),
        "oscillation": _table(folder / "oscillation.csv", folder),
        "analyses": _analyses(folder),
        "command_line": command_line,
        "facts": {key: results.get(key) for key in FACTS} | (results.get("versions") or {}),
        "config": config,
    }
    return write_page("run.html.j2", folder, context)


def write_page(template: str, folder: Path, context: Mapping[str, Any]) -> Path:
    """Write the page of a directory, completely or not at all.

    Args:
        template: file of the template.
        folder: the directory.
        context: variables of the template.

    Returns:
        The path of the page.
    """
    page = ENVIRONMENT.get_template(template).render(folder=folder, contents=[], **context)
    write_text(folder / FILE, page)
    return folder / FILE


def columns(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Names of the non-empty columns, each with True if all non-empty cells begin like a number.

    The first of them has False, because it contains the names of the rows.
    """
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    non_empty_columns: list[tuple[str, bool]] = []
    for name in names:
        texts = [format_value(row.get(name, "")) for row in rows]
        first_characters = [text[0] for text in texts if text]
        if first_characters:
            is_numeric = all(character in "+-−–.0123456789" for character in first_characters)
            is_name = not non_empty_columns
            non_empty_columns.append((name, is_numeric and not is_name))
    return non_empty_columns


def _table(path: Path, folder: Path, names: Sequence[str] = ()) -> list[Row]:
    """Read the rows of a CSV file, and parse numbers; no rows if the file is not in `folder`.

    If `names` are given, only these columns are returned. A first column with labels of models is
    left out if all labels are equal.
    """
    rows = csv_rows(path) if is_inside(path, folder) else []
    if not rows:
        return []
    wanted = names or rows[0]
    selected = [name for name in rows[0] if name in wanted]
    # A later column called `net` belongs to a class of this name.
    if selected[:1] == ["net"] and len({row.get("net") for row in rows}) == 1:
        selected.remove("net")
    table: list[Row] = []
    for row in rows:
        cells: dict[str, Any] = {}
        for name in selected:
            value = parse_number(row[name])
            cells[name] = row[name] if value is None else value
        table.append(cells)
    return table


def _float_cost(folder: Path) -> dict[str, float]:
    """Cost of the first model in float, from the cost analysis in the folder; empty if unknown."""
    summary = json_object(folder / ANALYSES / "cost.json", folder).get("summary", {})
    cost: dict[str, Any] = next(iter(summary.values()), {})
    return cost.get("in_float") or {}


def _headline_numbers(results: Row, float_cost: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Title, value and explanation of each number at the top of the page."""
    headline_numbers = []
    top1 = results.get("top1")
    if top1 is not None:
        meaning = f"{results.get('split')} split"
        top1_fp = results.get("top1_fp")
        if top1_fp is not None:
            meaning += f", {top1 - top1_fp:+.2f} compared with float".replace("-", "−")
        headline_numbers.append(("Top-1", f"{top1:.2f} %", meaning))
    agreement = results.get("agreement")
    if agreement is not None:
        meaning = "of the images get the checkpoint's class"
        headline_numbers.append(("Same class", f"{agreement:.2f} %", meaning))
    for title, key, unit, less in (
        ("Size", "size_bytes", "B", "smaller"),
        ("Bit operations", "bitops", "", "fewer"),
    ):
        cost = results.get(key)
        if not cost:
            continue
        meaning = ""
        if float_cost.get(key, cost) != cost:
            meaning = f"{float_cost[key] / cost:,.1f}× {less} than in float"
        headline_numbers.append((title, format_si(cost, unit), meaning))
    seconds = results.get("wall_seconds")
    if seconds is not None:
        headline_numbers.append(("Time", format_duration(seconds), results.get("device") or ""))
    return headline_numbers


def _model_rows(results: Row, float_cost: Mapping[str, float]) -> list[Row]:
    """A row for the model; a quantized model has a float row first if float results are known.

    Columns are left out if empty for the model. There are no rows if its size is unknown.
    """
    if not results.get("size_bytes"):
        return []
    bits = bits_of(results.get("recipe"))
    float_row: dict[str, Any] = {}
    model_row: dict[str, Any] = {"model": f"Quantized, {bits}" if bits else "Float"}
    for key, name in RESULT_COLUMNS.items():
        if results.get(key) is not None:
            float_row[name] = results.get(f"{key}_fp", float_cost.get(key))
            model_row[name] = results[key]
    if bits and any(float_row.values()):
        return [{"model": "Float"} | float_row, model_row]
    return [model_row]


def _file_rows(results: Row) -> list[Row]:
    """Rows with the bytes of each part of an exported file.

    If the file was compared with other files, the rows are whole files instead: this file, the
    model's float file and, for ONNX, its int8 file, with the time of one image where measured.
    """
    kind = "file" if results.get("agrees") else "part"
    latencies = results.get("latency_ms") or {}
    rows: list[Row] = []
    for name, size in (results.get("bytes") or {}).items():
        row = {kind: name, "bytes": size}
        for runtime, times in latencies.items():
            if times:
                row[f"{runtime}, ms"] = times.get(name)
        rows.append(row)
    return rows


def _analyses(folder: Path) -> list[dict[str, Any]]:
    """Analyses in the run directory (from `analyze`) and in its folder `analysis/`."""
    analyses = []
    for subfolder in (folder, folder / ANALYSES):
        for path in sorted(subfolder.glob("*.json")):
            index = json_object(path, folder)
            if "analysis" in index and "tables" in index:
                analyses.append(_analysis(index, subfolder, folder))
    return analyses


def _analysis(index: Row, subfolder: Path, folder: Path) -> dict[str, Any]:
    """Figures, shown tables and names of all table files of one analysis."""
    is_folded = subfolder != folder
    pictures = []
    for figure, file in _existing_entries(index.get("figures"), subfolder, folder):
        pictures.append({**figure, "source": data_url(read_file(file))})
    tables = []
    files = []
    for table, file in _existing_entries(index["tables"], subfolder, folder):
        files.append(file.resolve().relative_to(folder.resolve()))
        if not is_folded or file.name in LAYERS:
            rows = _table(file, folder, LAYERS.get(file.name, ()))
            tables.append((table["title"], file.name, rows))
    return {
        "name": index["analysis"],
        "is_folded": is_folded,
        "pictures": pictures,
        "tables": tables,
        "files": files,
    }


def _existing_entries(entries: object, subfolder: Path, folder: Path) -> list[tuple[Row, Path]]:
    """Entries of an index whose file exists in the folder, each with the path of the file."""
    existing_entries: list[tuple[Row, Path]] = []
    if not isinstance(entries, list):
        return existing_entries
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            continue
        path = subfolder / entry["file"]
        if is_inside(path, folder):
            existing_entries.append((entry, path))
    return existing_entries


ENVIRONMENT.filters |= {"columns": columns, "format_value": format_value}
