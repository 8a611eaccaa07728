"""What an analysis leaves in its folder: tables as CSV, pictures as SVG and PNG, and `<name>.json`, which names them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.analysis.analysis import Drawing, Outcome
from qat.utils.files import csv_text, json_text, replacing, write_text

DPI = 150


def write_outcome(folder: Path, name: str, settings: Mapping[str, Any], outcome: Outcome, *, png: bool = True) -> None:
    """Write everything; the index last, so that what it names is there.

    Args:
        folder: where to.
        name: of the analysis.
        settings: of the analysis, plain data.
        outcome: what it found.
        png: also write pictures as PNG, which takes as long as all else.
    """
    for table in outcome.tables:
        write_text(folder / f"{table.name}.csv", csv_text(table.rows))
    for drawing in outcome.drawings:
        save(folder, drawing, ("svg", "png") if png else ("svg",))
    index = {
        "analysis": name,
        "settings": dict(settings),
        "summary": outcome.summary,
        "tables": [{"file": f"{table.name}.csv", "title": table.title} for table in outcome.tables],
        "figures": [
            {"file": f"{d.name}.svg", "png": f"{d.name}.png" if png else None, "title": d.title, "alt": d.alt} for d in outcome.drawings
        ],
    }
    write_text(folder / f"{name}.json", json_text(index))


def save(folder: Path, drawing: Drawing, kinds: Sequence[str] = ("svg", "png")) -> None:
    """Write a picture as SVG, whose text stays text, and as PNG."""
    import matplotlib.pyplot as plt

    # The same picture is the same file: no date, no random names in it.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": drawing.name}):
        for kind in kinds:
            with replacing(folder / f"{drawing.name}.{kind}") as temporary:
                metadata = {"Date": None, "Title": drawing.title, "Description": drawing.alt} if kind == "svg" else None
                drawing.figure.savefig(temporary, format=kind, dpi=DPI, metadata=metadata, bbox_inches="tight")
    plt.close(drawing.figure)
