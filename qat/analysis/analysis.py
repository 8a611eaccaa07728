"""What an analysis is: a class of settings whose `run` makes tables and figures of nets."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from qat.analysis.images import ImageSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = Mapping[str, str | int | float]
Row = dict[str, Any]
# Numbers of a net (images to logits) on images, `top1` and `loss` among them.
Score = Callable[[nn.Module, ImageSet], dict[str, float]]
NO_IMAGES = ImageSet((), "")


@dataclass(frozen=True)
class StudiedNet:
    """A net under analysis.

    Attributes:
        label: its name in plots and tables, different for each net.
        net: in eval mode, scales filled; every analysis leaves it as it was, bit for bit.
        model: timm's name.
        input_size: of its images.
        path: of its checkpoint, None where there is none.
    """

    label: str
    net: nn.Module
    model: str
    input_size: tuple[int, int, int]
    path: Path | None = None


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation, see `qat.analysis.runner.measure`.

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
class Advice:
    """Something to worry about: where, what, and what to do."""

    where: str
    what: str
    advice: str


@dataclass(frozen=True)
class Outcome:
    """What an analysis found.

    Attributes:
        summary: plain data, for `results.json`.
    """

    summary: dict[str, Any]
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()
    warnings: Sequence[Advice] = ()


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
