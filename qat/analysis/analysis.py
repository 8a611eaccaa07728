"""What an analysis is: a class of settings whose `run` makes tables and figures of nets."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.nn.quant_module import kept_weights
from qat.utils.probing import probing
from qat.utils.text import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0
Batch = tuple[Tensor, Tensor]
Key = Mapping[str, str | int | float]
Row = dict[str, Any]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        batches: images (B, C, H, W) as the net sees them, and class ids (B,), both on one device.
        split: where they come from.
    """

    batches: Sequence[Batch]
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
            sums.append(torch.stack([correct, F.cross_entropy(logits, target, reduction="sum").double()]))
        n_correct, loss = torch.stack(sums).sum(0).tolist()
        return {"top1": 100 * n_correct / self.n_images, "loss": loss / self.n_images}


# Numbers of a net (images to logits) on images, `top1` and `loss` among them.
Score = Callable[[nn.Module, ImageSet], dict[str, float]]
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

    key: Key
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
        A row for each point: its key, `top1` (percent), `loss`, and `seconds`.
    """
    if points:
        log.info("%d evaluations of %d %s images", len(points), images.n_images, images.split)
    began = logged = time.monotonic()
    rows = []
    for done, point in enumerate(points, 1):
        start = time.perf_counter()
        with probing(point.net, ()), point.change(), kept_weights(point.net):
            found = point.score(point.net, images) if point.score else images.score(point.net)
        rows.append({**point.key, **found, "seconds": round(time.perf_counter() - start, 3)})
        if (now := time.monotonic()) - logged > SECONDS_BETWEEN_LINES:
            logged = now
            log.info("%d of %d evaluations, about %s left", done, len(points), duration((now - began) / done * (len(points) - done)))
    return rows
