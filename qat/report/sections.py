"""Parts of the page, each from what a run has left; a part for which there is nothing is None."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qat.report.curves import search_curve, training_curves
from qat.report.files import RunFiles, Study
from qat.report.html import Html, element, joined
from qat.report.layers import used_files
from qat.report.numbers import number, percent, scaled, shown, spoken, times
from qat.report.svg import picture
from qat.report.tables import long_table, table

MOST_FACTS = 24


def bits_of(recipe: Mapping[str, Any] | None) -> str:
    """`W2 A2`."""
    return "float" if not recipe or recipe.get("name") == "fp" else f"W{recipe.get('bits')} A{recipe.get('act_bits')}"


def float_cost(run: RunFiles) -> tuple[float | None, float | None]:
    """Bytes and bit operations of the same net in float32; None where they are not known."""
    study = run.study("cost")
    nets = list((study.index.get("summary") or {}).values()) if study else []
    in_float = nets[0].get("in_float") if len(nets) == 1 and isinstance(nets[0], Mapping) else None
    if not isinstance(in_float, Mapping):
        return None, None
    return number(in_float.get("size_bytes")), number(in_float.get("bitops"))


def key_figures(run: RunFiles) -> Html | None:
    """What matters most, in large."""
    results = run.results
    if results.get("size_bytes") is None:
        return None
    is_float = bits_of(results.get("recipe")) == "float"
    size, bitops, seconds, top1 = (number(results.get(key)) for key in ("size_bytes", "bitops", "wall_seconds", "top1"))
    float_size, float_bitops = float_cost(run)
    smaller = f"{times(float_size / size)} smaller than in float" if size and float_size and not is_float else "as stored"
    fewer = f"{times(float_bitops / bitops)} fewer than in float" if bitops and float_bitops and not is_float else "of one image"
    entries = [
        ("Top-1", f"{percent(top1)} %" if top1 is not None else None, f"{results.get('split')} split{_lost(results)}"),
        ("Size", scaled(size, "B") if size else None, smaller),
        ("Bit operations", scaled(bitops, "") if bitops else None, fewer),
        ("Time", spoken(seconds) if seconds is not None else None, str(results.get("device") or "")),
    ]
    tiles = [
        element("div", element("dt", name), element("dd", element("b", value), element("span", hint)))
        for name, value, hint in entries
        if value
    ]
    return element("dl", *tiles, class_="figures") if tiles else None


def _lost(results: Mapping[str, Any]) -> str:
    top1, top1_fp = number(results.get("top1")), number(results.get("top1_fp"))
    return "" if top1 is None or top1_fp is None else f", {top1 - top1_fp:+.2f} to float".replace("-", "−")


def headline(run: RunFiles) -> Html | None:
    """The float net and the quantized one."""
    results = run.results
    if results.get("size_bytes") is None:
        return None
    recipe = bits_of(results.get("recipe"))
    size, bitops = number(results.get("size_bytes")), number(results.get("bitops"))
    own = {
        "Top-1, %": _fixed(number(results.get("top1"))),
        "Top-5, %": _fixed(number(results.get("top5"))),
        "Loss": shown(results.get("loss")) or "–",
        "Bytes": shown(size),
        "Bit operations": shown(bitops) or "–",
    }
    if recipe == "float":
        return table("Results", [{"net": "Float", **own}], ident="results-caption")
    float_size, float_bitops = float_cost(run)
    top1, top1_fp = number(results.get("top1")), number(results.get("top1_fp"))
    in_float = {
        "Top-1, %": _fixed(top1_fp),
        "Top-5, %": "–",
        "Loss": "–",
        "Bytes": shown(float_size) or "–",
        "Bit operations": shown(float_bitops) or "–",
    }
    change = {
        "Top-1, %": "–" if top1 is None or top1_fp is None else joined([f"{top1 - top1_fp:+.2f}".replace("-", "−")]),
        "Top-5, %": "–",
        "Loss": "–",
        "Bytes": f"{times(float_size / size)} fewer" if size and float_size else "–",
        "Bit operations": f"{times(float_bitops / bitops)} fewer" if bitops and float_bitops else "–",
    }
    rows = [{"net": "Float", **in_float}, {"net": f"Quantized, {recipe}", **own}, {"net": "Change", **change}]
    return table(
        f"Accuracy on the {results.get('split')} split, bytes as stored, bit operations of one image", rows, ident="results-caption"
    )


def _fixed(value: float | None) -> Html:
    """A percentage with both its decimals, also where they are zeros."""
    return joined([percent(value)])


def curves(run: RunFiles) -> Html | None:
    """The course of the training."""
    drawn = training_curves(run.metrics)
    return element("div", *drawn, class_="plots") if drawn else None


def search(run: RunFiles) -> Html | None:
    """The search over scales."""
    parts: list[Html] = [search_curve(run.search)] if run.search else []
    facts = run.results.get("search")
    if isinstance(facts, Mapping):
        parts.append(_facts("What the search did", {key: value for key, value in facts.items() if not isinstance(value, Mapping)}))
    return element("div", *parts, class_="plots") if parts else None


def studies(run: RunFiles) -> Iterator[tuple[str, str, Html]]:
    """Id, title and content of each analysis that has something to show."""
    shown_already = used_files(run)
    for number_, study in enumerate(run.studies):
        parts = [element("div", *_pictures(study), class_="cards")] if study.index.get("figures") else []
        if study.folder == run.folder:
            parts += _tables(study, shown_already) or ([] if parts else [_facts("Summary", study.index.get("summary") or {})])
        elif parts:
            parts.append(_files(study))
        if parts:
            yield f"analysis-{number_}", f"Analysis: {study.name}", joined(parts)


def _pictures(study: Study) -> Iterator[Html]:
    for one in study.index["figures"]:
        alt = str(one.get("alt") or one.get("title"))
        try:
            image = picture(study.folder, one["file"], one.get("png"), alt)
        except OSError:
            yield element("p", f"{one['file']} cannot be read.", class_="hint")
            continue
        words = element("details", element("summary", "In words"), element("p", alt))
        yield element("figure", image, element("figcaption", element("strong", str(one.get("title", ""))), words), class_="card")


def _tables(study: Study, left_out: set[str]) -> list[Html]:
    found = []
    for one in study.index.get("tables") or []:
        if one["file"] in left_out:
            continue
        try:
            found.append(long_table(str(one.get("title", "")), study.rows(one["file"]), one["file"]))
        except OSError:
            found.append(element("p", f"{one['file']} cannot be read.", class_="hint"))
    return found


def _files(study: Study) -> Html:
    """Where the tables are that nobody asked for."""
    names = [joined([element("code", f"{study.folder.name}/{one['file']}"), f" ({one.get('title')})"]) for one in study.index["tables"]]
    return element("p", "As tables: ", joined(names, ", "), class_="hint")


def _facts(caption: str, facts: Mapping[str, Any]) -> Html:
    return table(caption, [{"what": name, "value": shown(value)} for name, value in list(_leaves(facts))[:MOST_FACTS]])


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Scalars of nested dicts, by their path."""
    if not isinstance(node, Mapping):
        if not isinstance(node, list | tuple):
            yield path, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{path}.{key}".lstrip(".").replace("_", " "))
