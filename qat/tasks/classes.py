"""Accuracy class by class, and which classes are taken for which others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.utils.files import csv_lines, csv_text, write_text
from qat.utils.text import printable

CLASSES, CONFUSION = "classes.csv", "confusion.csv"
MOST_PAIRS = 10


def class_results(confusion: Tensor, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The keys of `results.json` about classes.

    Args:
        confusion: (K, K), whole numbers: images of the class of the row that are taken for the class of the column.
        names: K of them.

    Returns:
        `classes`: of each its name, images, and top-1 in percent of them (None of a class without images); `confused`: the pairs that are
        confused most often, with the images and their share in percent of the true class.
    """
    images, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    classes = [
        {"class": name, "images": n, "top1": round(100 * hits / n, 4) if n else None}
        for name, n, hits in zip(names, images, right, strict=True)
    ]
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.topk(min(MOST_PAIRS, len(wrong)))
    confused = [
        {
            "true": names[place // len(names)],
            "predicted": names[place % len(names)],
            "images": n,
            "share": round(100 * n / images[place // len(names)], 4),
        }
        for n, place in zip(counts.tolist(), places.tolist(), strict=True)
        if n
    ]
    return {"classes": classes, "confused": confused}


def write_class_tables(folder: Path, confusion: Tensor, names: Sequence[str]) -> None:
    """Write `classes.csv`, and `confusion.csv` with a row for each true and a column for each predicted class."""
    shown = [printable(name) for name in names]
    classes = class_results(confusion, shown)["classes"]
    write_text(folder / CLASSES, csv_text(classes))
    rows = [[name, *counts] for name, counts in zip(shown, confusion.tolist(), strict=True)]
    write_text(folder / CONFUSION, csv_lines([["true \\ predicted", *shown], *rows]))
