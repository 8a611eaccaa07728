"""`report.html`: one file with everything a person wants to know of a run; nothing is fetched, nothing leaves it."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path

from qat.report import sections
from qat.report.files import Origin, RunFiles, read_run
from qat.report.html import Html, element, joined
from qat.report.layers import layers_table
from qat.report.notes import notes_of, notes_section
from qat.report.numbers import percent, scaled
from qat.report.origin import origin as origin_section
from qat.utils.files import write_text

FILE = "report.html"
TITLES = {"train": "Training", "ptq": "Post-training quantization", "analyze": "Analysis", "eval": "Evaluation"}


def write_report(folder: Path, origin: Origin) -> Path:
    """Write the page of a run directory, whole or not at all.

    Args:
        folder: the run directory; what it lacks the page lacks.
        origin: how the run came about.

    Returns:
        The file.
    """
    path = folder / FILE
    write_text(path, page(read_run(folder, origin)))
    return path


def page(run: RunFiles) -> str:
    """The text of the page."""
    parts = [(ident, name, content) for ident, name, content in _parts(run) if content]
    return document(TITLES.get(run.command, "Run"), _subject(run), _lead(run), parts, str(run.folder))


def document(kind: str, subject: str, lead: str, parts: list[tuple[str, str, Html]], source: str) -> str:
    """A whole page.

    Args:
        kind: of what it is about: Training, Sweep.
        subject: its heading.
        lead: one sentence below that.
        parts: id, title and content of each.
        source: directory of the files that it was made from.
    """
    links = [element("li", element("a", name, href=f"#{ident}")) for ident, name, _ in parts]
    body = [
        element("a", "Skip to the content", href="#main", class_="skip"),
        element(
            "header",
            element("p", f"qat · {kind}", class_="kicker"),
            element("h1", subject),
            element("p", lead, class_="lead"),
        ),
        element("nav", element("ul", *links), aria_label="Parts of this page"),
        element("main", *(_section(ident, name, content) for ident, name, content in parts), id="main", tabindex="-1"),
        element("footer", element("p", f"Made by qat from the files in {source}. Nothing on this page is fetched from elsewhere.")),
        element("div", id="said", class_="unseen", role="status", aria_live="polite"),
    ]
    script = Html(_asset("script.js"))
    head = [
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content_="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content_=_policy(script)),
        element("meta", name_="color-scheme", content_="light dark"),
        element("title", f"{kind}: {subject}"),
        element("link", rel="icon", href="data:,"),
        element("style", Html(_asset("style.css"))),
    ]
    content = [element("head", *head), element("body", *body, element("script", script))]
    return f"<!DOCTYPE html>\n{element('html', joined(content, chr(10)), lang='en')}\n"


def _parts(run: RunFiles) -> list[tuple[str, str, Html | None]]:
    """Id, title and content, in their order."""
    notes = notes_of(run)
    results = [part for part in (sections.key_figures(run), sections.headline(run)) if part]
    return [
        ("notes", "Worth knowing", notes_section(notes) if notes else None),
        ("results", "Results", joined(results) if results else None),
        ("curves", "Course of the training", sections.curves(run)),
        ("search-part", "Search", sections.search(run)),
        ("layers", "Layers", layers_table(run)),
        *sections.studies(run),
        ("run", "How it was run", origin_section(run)),
    ]


def _section(ident: str, title: str, content: Html) -> Html:
    return element("section", element("h2", title, id=ident), content, aria_labelledby=ident)


def _subject(run: RunFiles) -> str:
    results = run.results
    named = [results.get("model") or (run.origin.config.get("model") or {}).get("name"), results.get("quant"), results.get("data")]
    return " · ".join(str(name) for name in named if name) or run.folder.name


def _lead(run: RunFiles) -> str:
    """One sentence."""
    results = run.results
    if results.get("error"):
        return "The run failed."
    if not results:
        return "The run has not ended."
    size = results.get("size_bytes")
    stored = f", {scaled(size, 'B')} as stored" if size else ""
    if results.get("top1") is not None:
        fp = results.get("top1_fp")
        compared = "" if fp is None else f" ({percent(fp)} % in float)"
        return f"{percent(results['top1'])} % top-1 on the {results.get('split')} split{compared}{stored}."
    if not results.get("analysis"):
        return ""
    weights = results.get("weights") or "a net"
    return f"{str(results['analysis']).capitalize()} of {weights if isinstance(weights, str) else ' and '.join(map(str, weights))}."


def _asset(name: str) -> str:
    return resources.files("qat.report").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """What a browser may load and run: pictures and styles of the page itself, and its one script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
