"""`report.html` of a run: one file with what its directory holds; nothing is fetched from elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qat.report.figures import bits_of, data_url, number, search_figure, shown, training_curves
from qat.utils.files import csv_rows, write_text
from qat.utils.text import duration, is_inside, json_object, printable, read_file, scaled, unlearned

FILE = "report.html"
ANALYSES = (
    "analysis"  # folder of the analyses that training and calibration make of their own model
)
# Tables of a run's own analyses that are shown, and their columns; the files have more.
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
MEASURED = {
    "top1": "Top-1, %",
    "top5": "Top-5, %",
    "loss": "Loss",
    "size_bytes": "Bytes",
    "bitops": "Bit operations",
}

# All text is escaped, a name that does not exist is an error, and control characters are shown as `\\x1b`.
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
    """Write the page of a run directory; what the directory lacks the page lacks.

    Returns:
        The file.
    """
    results, typed, config = (
        json_object(folder / "results.json", folder),
        json_object(folder / "command.json", folder),
        folder / "config.yaml",
    )
    command = str(results.get("command") or typed.get("command", "run")).removesuffix(".py")
    cost = json_object(folder / ANALYSES / "cost.json", folder).get("summary", {})
    in_float = next((one.get("in_float") or {} for one in cost.values()), {})
    context = {
        "kind": command,
        "subject": " · ".join(
            results[key] for key in ("model", "quant", "data") if results.get(key)
        )
        or folder.resolve().name,
        "results": results,
        "note": unlearned(results),
        "figures": _figures(results, in_float),
        "rows": _exported(results) if command == "export" else _measured(results, in_float),
        "curves": training_curves(_table(folder / "metrics.csv", folder)),
        "search": search_figure(_table(folder / "search.csv", folder)),
        "oscillation": _table(folder / "oscillation.csv", folder),
        "analyses": _analyses(folder),
        "typed": typed
        and f"{typed.get('program') or f'python {command}.py'} {shlex.join(typed['overrides'])}",
        "facts": {key: results.get(key) for key in FACTS} | (results.get("versions") or {}),
        "config": read_file(config).decode(errors="replace") if is_inside(config, folder) else None,
    }
    return write_page("run.html.j2", folder, context)


def write_page(template: str, folder: Path, context: Mapping[str, Any]) -> Path:
    """Write the page of a directory, whole or not at all.

    Args:
        template: of the page.
        folder: that the page is about.
        context: what the template shows.

    Returns:
        The file.
    """
    write_text(
        folder / FILE,
        ENVIRONMENT.get_template(template).render(folder=folder, contents=[], **context),
    )
    return folder / FILE


def columns(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Names of a table's columns that are not empty, each with whether it is one of numbers; the first names the rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    texts = {name: [text for row in rows if (text := shown(row.get(name, "")))] for name in names}
    kept = [name for name in names if texts[name]]
    return [
        (name, name != kept[0] and all(text[0] in "+-−–.0123456789" for text in texts[name]))
        for name in kept
    ]


def _table(path: Path, folder: Path, names: Sequence[str] = ()) -> list[Row]:
    """Rows of a CSV file in a folder, numbers as such; of some columns only, without the name of a model that is the same in all."""
    rows = csv_rows(path) if is_inside(path, folder) else []
    left_out = "net" if len({row.get("net") for row in rows}) == 1 else ""
    kept = [
        name
        for name in (rows[0] if rows else ())
        if name != left_out and (name in names or not names)
    ]
    return [
        {name: row[name] if (value := number(row[name])) is None else value for name in kept}
        for row in rows
    ]


def _figures(results: Row, in_float: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Title, value and meaning of the numbers that come first."""
    top1, top1_fp, agreement, seconds = (
        results.get(key) for key in ("top1", "top1_fp", "agreement", "wall_seconds")
    )
    figures = []
    if top1 is not None:
        change = "" if top1_fp is None else f", {top1 - top1_fp:+.2f} to float".replace("-", "−")
        figures.append(("Top-1", f"{top1:.2f} %", f"{results.get('split')} split{change}"))
    if agreement is not None:
        figures.append((
            "Same class",
            f"{agreement:.2f} %",
            "of the images get the checkpoint's class",
        ))
    for title, key, unit, less in (
        ("Size", "size_bytes", "B", "smaller"),
        ("Bit operations", "bitops", "", "fewer"),
    ):
        if own := results.get(key):
            than = (
                f"{in_float[key] / own:,.1f}× {less} than in float"
                if in_float.get(key, own) != own
                else ""
            )
            figures.append((title, scaled(own, unit), than))
    if seconds is not None:
        figures.append(("Time", duration(seconds), results.get("device") or ""))
    return figures


def _measured(results: Row, in_float: Mapping[str, float]) -> list[Row]:
    """The model, after itself in float if it is quantized; scores that are not known have no column."""
    bits, names = (
        bits_of(results.get("recipe")),
        {key: name for key, name in MEASURED.items() if results.get(key) is not None},
    )
    known = {name: results.get(f"{key}_fp", in_float.get(key)) for key, name in names.items()}
    before = [{"model": "Float"} | known] if bits and any(known.values()) else []
    own = {"model": f"Quantized, {bits}" if bits else "Float"} | {
        name: results[key] for key, name in names.items()
    }
    return [*before, own] if results.get("size_bytes") else []


def _exported(results: Row) -> list[Row]:
    """Bytes of the parts of an exported file, or of the file beside those of its model in float and int8, with the time of one image."""
    times = (results.get("latency_ms") or {}).items()
    sizes = (results.get("bytes") or {}).items()
    what = "file" if results.get("agrees") else "part"
    return [
        {
            what: key,
            "bytes": size,
            **{f"{name}, ms": taken.get(key) for name, taken in times if taken},
        }
        for key, size in sizes
    ]


def _analyses(folder: Path) -> list[dict[str, Any]]:
    """What analyses left, in the run directory (of the command `analyze`) and in `analysis/` (of the run's own model)."""
    found = []
    for place in (folder, folder / ANALYSES):
        for index in (json_object(path, folder) for path in sorted(place.glob("*.json"))):
            if "analysis" not in index or "tables" not in index:
                continue
            figures = _listed(index.get("figures"), place, folder)
            tables = _listed(index["tables"], place, folder)
            found.append({
                "name": index["analysis"],
                "is_folded": place != folder,
                "pictures": [
                    {**figure, "source": data_url(read_file(file))} for figure, file in figures
                ],
                "tables": [
                    (table["title"], file.name, _table(file, folder, LAYERS.get(file.name, ())))
                    for table, file in tables
                    if place == folder or file.name in LAYERS
                ],
                "files": [file.resolve().relative_to(folder.resolve()) for _, file in tables],
            })
    return found


def _listed(entries: Any, place: Path, folder: Path) -> list[tuple[Row, Path]]:
    """Entries of the index of an analysis that name a file in a folder, each with the path of the file."""
    named = [
        (entry, place / entry["file"])
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("file"), str)
    ]
    return [(entry, path) for entry, path in named if is_inside(path, folder)]


ENVIRONMENT.filters |= {"columns": columns, "shown": shown}
