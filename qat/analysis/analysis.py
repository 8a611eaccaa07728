"""Base class of analyses, and functions that draw and write results.

An analysis is a dataclass of settings; its `run` method computes tables and figures of models.
"""

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

from qat.nn.quant_module import cached_weights
from qat.utils.files import csv_text, json_text, replace_atomically, write_text
from qat.utils.probing import probing
from qat.utils.text import format_duration

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0
# Colours that colour-blind readers can distinguish (Okabe and Ito, 2008, "Color Universal Design"),
# without yellow, which is too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#767676"
SEQUENTIAL_COLORMAP = "Blues"  # from white to dark blue; darker means more, also in greyscale
FIGURE_WIDTH = 7.2  # inches
DPI = 150
Row = dict[str, Any]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        batches: preprocessed images (B, C, H, W) and class ids (B,) int64, on the models' device.
        split: dataset split of the images; empty if there are none.
    """

    batches: Sequence[tuple[Tensor, Tensor]]
    split: str

    @property
    def num_images(self) -> int:
        """Number of images in all batches."""
        return sum(len(target) for _, target in self.batches)

    @torch.no_grad()
    def score(self, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Compute `top1`, the accuracy in percent, and `loss`, the mean cross-entropy.

        Args:
            predict: function that maps images (B, C, H, W) to logits (B, K).
        """
        sums = []
        for images, target in self.batches:
            logits = predict(images).float()
            correct = (logits.argmax(-1) == target).sum().double()
            loss_sum = F.cross_entropy(logits, target, reduction="sum").double()
            sums.append(torch.stack([correct, loss_sum]))
        num_correct, total_loss = torch.stack(sums).sum(0).tolist()
        return {"top1": 100 * num_correct / self.num_images, "loss": total_loss / self.num_images}


# A function that computes numbers from a model, which maps images to logits.
Score = Callable[[nn.Module], dict[str, float]]
NO_IMAGES = ImageSet((), "")


@dataclass(frozen=True)
class StudiedNet:
    """A model under analysis.

    Attributes:
        label: name in plots and tables, different for each model.
        net: the model, in eval mode with its scales set; analyses leave it unchanged, bit for bit.
        input_size: (channels, height, width) of the images.
        path: checkpoint file, or None.
    """

    label: str
    net: nn.Module
    input_size: tuple[int, int, int]
    path: Path | None = None


@dataclass(frozen=True)
class EvaluationPoint:
    """An evaluation of a model for `measure`.

    Attributes:
        key: columns that identify the evaluation in the table, such as `net`.
        net: the model to evaluate.
        change: returns a context manager that changes the model inside a `with` block; the default
            changes nothing.
        score: function that computes numbers from the model; None = `ImageSet.score` (top-1 and
            cross-entropy).
    """

    key: Row
    net: nn.Module
    change: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    score: Score | None = None


@dataclass(frozen=True)
class Table:
    """Rows for a CSV file and the report; a column that a row lacks is an empty cell."""

    name: str
    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: file name without extension.
        title: text above the figure.
        alt: description of the figure in words and numbers, for readers who cannot see it.
        figure: matplotlib figure.
    """

    name: str
    title: str
    alt: str
    figure: Figure


@dataclass(frozen=True)
class Outcome:
    """Results of an analysis.

    Attributes:
        summary: dict of plain data for JSON files.
        tables: tables; each becomes a CSV file.
        drawings: figures.
    """

    summary: dict[str, Any]
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()


class Analysis(ABC):
    """Base class of analyses; a subclass is a frozen dataclass that checks its own settings.

    Attributes:
        name: name of the analysis and of its files.
        split: default dataset split of the images; None = no images. Results on a split that was
            used for training, calibration or selection say less about new images.
    """

    name: ClassVar[str]
    split: ClassVar[str | None] = "test"

    @abstractmethod
    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Analyse models without changing them.

        Args:
            nets: one model, or several models to compare.
            images: images to evaluate, or `NO_IMAGES`.

        Raises:
            UsageError: the analysis cannot be run with these settings and models.
        """


def measure(points: Sequence[EvaluationPoint], images: ImageSet) -> list[Row]:
    """Evaluate every point, and leave all models unchanged.

    Returns:
        A row for each point: its key and its scores, by default `top1` (percent) and `loss`.
    """
    log.info("%d evaluations of %d %s images", len(points), images.num_images, images.split)
    start = time.monotonic()
    last_log_time = start
    rows = []
    for num_evaluated, point in enumerate(points, 1):
        score = point.score or images.score
        with probing(point.net, ()), point.change(), cached_weights(point.net):
            rows.append(point.key | score(point.net))
        now = time.monotonic()
        if now - last_log_time > SECONDS_BETWEEN_LINES:
            last_log_time = now
            seconds_left = (now - start) / num_evaluated * (len(points) - num_evaluated)
            log.info(
                "%d of %d evaluations, about %s left",
                num_evaluated,
                len(points),
                format_duration(seconds_left),
            )
    return rows


def panels(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = FIGURE_WIDTH,
    height: float = 3.6,
    sharex: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Create a figure with panels in the style of all figures of qat.

    Each panel has two spines, and a pale grid behind the data. A figure of default width remains
    legible at 720 pixels. Returns the figure and the axes of the panels, row by row.

    Args:
        rows: number of rows.
        columns: number of columns.
        width: width of the figure in inches.
        height: height of the figure in inches.
        sharex: True = the panels share an x axis.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False, sharex=sharex).flat]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#E6E6E6", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8, length=3)
        panel.xaxis.label.set_size(9)
        panel.yaxis.label.set_size(9)
    return figure, axes


def save_figure(
    file: Path | io.BytesIO, figure: Figure, title: str, description: str, file_type: str = "svg"
) -> None:
    """Save a figure so that equal figures become equal files.

    In SVG, text is saved as text, not as outlines. Dollar signs do not start formulas. The file
    contains no date and no random names.

    Args:
        file: path or buffer.
        figure: matplotlib figure.
        title: title in the metadata of an SVG file.
        description: description of the figure in the metadata of an SVG file.
        file_type: `svg` or `png`.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "path.simplify_threshold": 0.5,
    }
    metadata = None
    if file_type == "svg":
        metadata = {"Date": None, "Title": title, "Description": description}
    with mpl.rc_context(settings):
        figure.savefig(file, format=file_type, dpi=DPI, metadata=metadata, bbox_inches="tight")


def write_outcome(
    folder: Path, name: str, settings: Mapping[str, Any], outcome: Outcome, *, png: bool = True
) -> None:
    """Write CSV tables, SVG figures, PNG figures if `png` is True, and then `<name>.json`.

    This file contains settings and summary, and lists the CSV and SVG files.

    Args:
        folder: target folder.
        name: name of the analysis.
        settings: settings of the analysis, as plain data.
        outcome: results of the analysis.
        png: True = also write figures as PNG, which takes longer.
    """
    for table in outcome.tables:
        write_text(folder / f"{table.name}.csv", csv_text(table.rows))
    kinds = ("svg", "png") if png else ("svg",)
    for drawing in outcome.drawings:
        for file_type in kinds:
            with replace_atomically(folder / f"{drawing.name}.{file_type}") as temporary:
                save_figure(temporary, drawing.figure, drawing.title, drawing.alt, file_type)
    tables = [{"file": f"{table.name}.csv", "title": table.title} for table in outcome.tables]
    figures = []
    for drawing in outcome.drawings:
        file = f"{drawing.name}.svg"
        figures.append({"file": file, "title": drawing.title, "alt": drawing.alt})
    index = {
        "analysis": name,
        "settings": settings,
        "summary": outcome.summary,
        "tables": tables,
        "figures": figures,
    }
    write_text(folder / f"{name}.json", json_text(index))
