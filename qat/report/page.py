"""`report.html`: one file with everything a person wants to know of a run; nothing is fetched, nothing leaves it."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qat.report.curves import search_curve, training_curves
from qat.report.layers import layer_rows, used_files
from qat.report.notes import grouped, notes_of
from qat.report.numbers import bits_of, number, percent, shown, signed, times
from qat.report.run_files import AnalysisFiles, Origin, Row, RunFiles, read_run
from qat.utils.files import write_text
from qat.utils.text import MISSING, duration, leaves, scaled

FILE = "report.html"
TITLES = {"train": "Training", "ptq": "Post-training quantization", "analyze": "Analysis", "eval": "Evaluation", "export": "Export"}
MOST_ROWS = 200  # of a table
MOST_PLACES = 8  # of notes with the same advice
MOST_FACTS = 24
SAFE = " /:;=,.()!*~?@$'-_"  # characters of a data URL in double quotes
LARGEST = 150_000  # bytes of an SVG file that is shown; above it a PNG that is smaller takes its place
# Pictures and styles of the page itself, and its one script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'"
# What is beside an exported file, and where both were timed.
COMPARED = {"float": "Float", "int8": "Dynamic int8 of onnxruntime", "this": "This file"}
RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO"}
MEASURES = ("top1", "top5", "loss", "images", "top1_fp", "top1_calibrated", "top1_start", "size_bytes", "bitops", "wall_seconds")


def write_report(folder: Path, origin: Origin) -> Path:
    """Write the page of a run directory, whole or not at all.

    Args:
        folder: the run directory; what it lacks the page lacks.
        origin: how the run came about.

    Returns:
        The file.
    """
    run = read_run(folder, origin)
    facts = run.results.get("search")
    context = {
        "run": run,
        "n": _numbers(run),
        "exported": _exported(run.results),
        "titles": TITLES,
        "notes": grouped(notes_of(run)),
        "curves": training_curves(run.metrics),
        "search_curve": search_curve(run.search),
        "search_facts": _facts({key: one for key, one in facts.items() if key != "bits"} if isinstance(facts, Mapping) else {}),
        "classes": _table(run.results.get("classes"), {"class": "Class", "images": "Images", "top1": "Top-1, %"}),
        "confused": _table(
            run.results.get("confused"), {"true": "Class", "predicted": "Taken for", "images": "Images", "share": "Of the class, %"}
        ),
        "layers": layer_rows(run),
        "analyses": [_analysis(one, run.folder, used_files(run)) for one in run.analyses],
        "versions": _versions(run),
    }
    write_text(folder / FILE, render("run.html.j2", folder, context))
    return folder / FILE


def render(template: str, folder: Path, context: Mapping[str, Any]) -> str:
    """The text of a page.

    Args:
        template: of the page.
        folder: that the page is about.
        context: what the template shows.
    """
    environment = _environment()
    script = environment.get_template("script.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"folder": str(folder), "script": Markup(script), "policy": POLICY.format(digest), "contents": []}
    return environment.get_template(template).render(**own, **context)


@functools.cache
def _environment() -> Environment:
    """Templates in which all text is escaped, and a name that does not exist is an error."""
    found = Environment(
        loader=PackageLoader("qat.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    for one in (columns, duration, percent, scaled, shown, signed, times):
        found.filters[one.__name__] = one
    found.globals |= {"most_rows": MOST_ROWS, "most_places": MOST_PLACES}
    return found


def columns(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Names of a table's columns, each with whether it is one of numbers; the first names the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [(name, i > 0 and _is_numeric([row.get(name) for row in rows])) for i, name in enumerate(names)]


def _is_numeric(cells: Sequence[object]) -> bool:
    known = [str(cell) for cell in cells if cell not in (None, "", MISSING)]  # noqa: PLR6201  (a cell of a file may be a list)
    return bool(known) and all(number(cell) is not None or cell[0] in "+−0123456789" for cell in known)


def _numbers(run: RunFiles) -> dict[str, Any]:
    """What was measured, and the same model in float32; None where it is not known."""
    known: dict[str, Any] = {name: number(run.results.get(name)) for name in MEASURES}
    bits = bits_of(run.results.get("recipe"))
    cost = run.analysis("cost")
    models = list((cost.index.get("summary") or {}).values()) if cost else []
    in_float = models[0].get("in_float") if len(models) == 1 and isinstance(models[0], Mapping) else None
    size, bitops = (number(in_float.get(name)) if isinstance(in_float, Mapping) else None for name in ("size_bytes", "bitops"))
    smaller = size / known["size_bytes"] if bits and size and known["size_bytes"] else None
    fewer = bitops / known["bitops"] if bits and bitops and known["bitops"] else None
    return known | {"bits": bits, "float_size": size, "float_bitops": bitops, "smaller": smaller, "fewer": fewer}


def _exported(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Size and time of an exported file beside the float file of its net: figures (title, value, meaning) and a table. None of others."""
    size, agreement = number(results.get("size_bytes")), number(results.get("agreement"))
    if results.get("command") != "export" or size is None:
        return None
    sizes, times_of = _of_files(results.get("bytes")), results.get("latency_ms")
    taken = {runtime: _of_files(times_of.get(runtime)) for runtime in RUNTIMES} if isinstance(times_of, Mapping) else {}
    whole = sizes.get("float")
    figures = [("Size", scaled(size, "B"), f"{times(whole / size)} smaller than in float" if whole else "as stored")]
    baseline = taken.get("onnxruntime", {}).get("float")
    for name, title in RUNTIMES.items():
        own = taken.get(name, {}).get("this")
        if baseline and own:
            figures.append((f"Time, {title}", f"{percent(own)} ms", f"{own / baseline:.2f} of float in onnxruntime"))
    figures.append(("Same class", f"{percent(agreement)} %", "of the images as the checkpoint, or more"))
    rows = [
        {"file": label, "Bytes": sizes[name]}
        | {f"{title}, ms": percent(taken[runtime].get(name)) for runtime, title in RUNTIMES.items() if taken.get(runtime)}
        for name, label in COMPARED.items()
        if name in sizes
    ]
    return {"file": results.get("file"), "figures": figures, "rows": rows}


def _of_files(node: object) -> dict[str, float]:
    """Of each file; what is no number is left out."""
    found = {name: number(node.get(name)) for name in COMPARED} if isinstance(node, Mapping) else {}
    return {name: one for name, one in found.items() if one}


def _table(node: object, names: Mapping[str, str]) -> list[Row]:
    """Rows of a table in `results.json` under the headings of a page; what is none is left out."""
    rows = [one for one in node if isinstance(one, Mapping)] if isinstance(node, list) else []
    return [{title: one.get(name, MISSING) for name, title in names.items()} for one in rows]


def _analysis(analysis: AnalysisFiles, folder: Path, used: set[str]) -> dict[str, Any]:
    """What an analysis shows: pictures, and of one that was asked for its tables, or where there is nothing else its summary."""
    index = analysis.index
    pictures = [_picture(analysis.folder, one) for one in index.get("figures") or []]
    is_asked_for = analysis.folder == folder
    named = [{"file": str(one["file"]), "title": str(one.get("title", ""))} for one in index.get("tables") or []]
    tables = [one | {"rows": analysis.rows(one["file"])} for one in named if is_asked_for and one["file"] not in used]
    return {
        "name": analysis.name,
        "pictures": pictures,
        "tables": tables,
        "summary": _facts(index.get("summary") or {}) if is_asked_for and not tables and not pictures else [],
        "others": [{**one, "file": f"{analysis.folder.name}/{one['file']}"} for one in named] if pictures and not is_asked_for else [],
    }


def _picture(folder: Path, one: Mapping[str, Any]) -> dict[str, Any]:
    """A picture file for an `img`, its data in the page: ids and scripts in it, if any, stay inside. None where it cannot be read."""
    title = str(one.get("title", ""))
    found = {"file": str(one["file"]), "title": title, "alt": str(one.get("alt") or title), "source": None}
    svg, png = (folder / Path(str(one.get(key) or "none")).name for key in ("file", "png"))
    try:
        if png.is_file() and (not svg.is_file() or svg.stat().st_size > max(LARGEST, png.stat().st_size)):
            return found | {"source": f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"}
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|(?<=>)\s+(?=<)", "", svg.read_text(encoding="utf-8"), flags=re.DOTALL)
        return found | {"source": f"data:image/svg+xml,{quote(text, safe=SAFE)}"}
    except (OSError, ValueError):
        return found


def _versions(run: RunFiles) -> list[tuple[str, Any]]:
    results = run.results
    seconds = number(results.get("wall_seconds"))
    facts = {
        "directory": str(run.folder),
        "finished": results.get("finished"),
        "took": None if seconds is None else duration(seconds),
        "device": results.get("device"),
        "seed": results.get("seed"),
        "weights": results.get("weights"),
        "git commit": results.get("git_commit"),
        **(results.get("versions") or {}),
    }
    return list(facts.items())


def _facts(node: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The first scalars of nested dicts, named by their path."""
    found = [(" ".join(path).replace("_", " "), value) for path, value in leaves(node) if not isinstance(value, list)]
    return found[:MOST_FACTS]
