"""What an analysis is: a class of settings whose `run` makes tables and figures of nets; how these look and are written."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

from qat.nn.quant_module import kept_weights
from qat.utils.files import csv_text, json_text, replacing, write_text
from qat.utils.probing import probing
from qat.utils.text import duration

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0
# Colours that colour-blind eyes tell apart: Okabe and Ito, 2008 ("Color Universal Design"), without the yellow, too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#767676"
HEAT = "Blues"  # from white to dark blue: also in grey, darker is more
WIDTH, DPI = 7.2, 150  # inches, pixels an inch
Row = dict[str, Any]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        batches: images (B, C, H, W) as the net sees them, and class ids (B,), both on one device.
        split: where they come from.
    """

    batches: Sequence[tuple[Tensor, Tensor]]
    split: str

    @property
    def n_images(self) -> int:
        """Images in all batches."""
        return sum(len(target) for _, target in self.batches)

    @torch.no_grad()
    def score(self, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Top-1 in percent, and mean cross-entropy.

        Args:
            predict: maps images to logits (B, K).
        """
        sums = []
        for images, target in self.batches:
            logits = predict(images).float()
            correct = (logits.argmax(-1) == target).sum().double()
            sums.append(
                torch.stack([correct, F.cross_entropy(logits, target, reduction="sum").double()])
            )
        n_correct, loss = torch.stack(sums).sum(0).tolist()
        return {"top1": 100 * n_correct / self.n_images, "loss": loss / self.n_images}


# Numbers of a net (images to logits).
Score = Callable[[nn.Module], dict[str, float]]
NO_IMAGES = ImageSet((), "")


@dataclass(frozen=True)
class StudiedNet:
    """A net under analysis.

    Attributes:
        label: its name in plots and tables, different for each net.
        net: in eval mode, scales filled; every analysis leaves it as it was, bit for bit.
        input_size: of its images.
        path: of its checkpoint, None where there is none.
    """

    label: str
    net: nn.Module
    input_size: tuple[int, int, int]
    path: Path | None = None


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation, see `measure`.

    Attributes:
        key: identifies it; its words are columns of the table, `net` the first of them.
        net: the net to evaluate.
        change: context in which the net is changed; none = as it is.
        score: what is measured; none = top-1 and cross-entropy, `ImageSet.score`.
    """

    key: Row
    net: nn.Module
    change: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    score: Score | None = None


@dataclass(frozen=True)
class Table:
    """Rows with the same keys, for a CSV file and the report."""

    name: str
    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: of its files, without ending.
        title: above it.
        alt: what it shows, in words, numbers included, for readers who do not see it.
        figure: matplotlib's.
    """

    name: str
    title: str
    alt: str
    figure: Figure


@dataclass(frozen=True)
class Outcome:
    """What an analysis found.

    Attributes:
        summary: plain data, for `results.json`.
    """

    summary: dict[str, Any]
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()


class Analysis(ABC):
    """A subclass is a frozen dataclass of settings that checks them when it is built.

    Attributes:
        name: of its files.
        split: whose images are read by default: one that was trained on, calibrated on or chosen by says less; None = no images.
    """

    name: ClassVar[str]
    split: ClassVar[str | None] = "test"

    @abstractmethod
    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Analyse nets, and leave them as they were.

        Args:
            nets: one or several to compare.
            images: of the split; `NO_IMAGES` where `split` is None.

        Raises:
            UsageError: a setting does not fit the nets.
        """


def measure(points: Sequence[EvaluationPoint], images: ImageSet) -> list[Row]:
    """Evaluate every point; each net is as before afterwards.

    Returns:
        A row for each point: its key and its score, by default `top1` (percent) and `loss`.
    """
    log.info("%d evaluations of %d %s images", len(points), images.n_images, images.split)
    began = logged = time.monotonic()
    rows = []
    for done, point in enumerate(points, 1):
        with probing(point.net, ()), point.change(), kept_weights(point.net):
            rows.append(point.key | (point.score or images.score)(point.net))
        if (now := time.monotonic()) - logged > SECONDS_BETWEEN_LINES:
            logged = now
            log.info(
                "%d of %d evaluations, about %s left",
                done,
                len(points),
                duration((now - began) / done * (len(points) - done)),
            )
    return rows


def panels(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = WIDTH,
    height: float = 3.6,
    sharex: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure of quiet axes, row by row: two spines, a pale grid below the data, text that is legible 720 pixels wide; inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = [*figure.subplots(rows, columns, squeeze=False, sharex=sharex).flat]
    for axis in grid:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#E6E6E6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, length=3)
        axis.xaxis.label.set_size(9)
        axis.yaxis.label.set_size(9)
    return figure, grid


def save_figure(
    file: Path | io.BytesIO, figure: Figure, title: str, words: str, kind: str = "svg"
) -> None:
    """Save a figure: text stays text, dollar signs in it too, and the same figure is the same file: no date, no random names."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with mpl.rc_context({
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "path.simplify_threshold": 0.5,
    }):
        metadata = {"Date": None, "Title": title, "Description": words} if kind == "svg" else None
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata, bbox_inches="tight")


def write_outcome(
    folder: Path, name: str, settings: Mapping[str, Any], outcome: Outcome, *, png: bool = True
) -> None:
    """Write tables as CSV, pictures as SVG and PNG, and last `<name>.json`, which names them all.

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
        for kind in ("svg", "png") if png else ("svg",):
            with replacing(folder / f"{drawing.name}.{kind}") as temporary:
                save_figure(temporary, drawing.figure, drawing.title, drawing.alt, kind)
    index = {
        "analysis": name,
        "settings": settings,
        "summary": outcome.summary,
        "tables": [{"file": f"{table.name}.csv", "title": table.title} for table in outcome.tables],
        "figures": [
            {"file": f"{one.name}.svg", "title": one.title, "alt": one.alt}
            for one in outcome.drawings
        ],
    }
    write_text(folder / f"{name}.json", json_text(index))
