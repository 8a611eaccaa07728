"""What an analysis is: evaluations of changed nets, or none, and what is made of their results."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from qat.analysis.images import Change, ImageSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = Mapping[str, str | int | float]
Row = dict[str, Any]
# Figures of a net (images to logits) on images, `top1` and `loss` among them.
Score = Callable[[nn.Module, ImageSet], dict[str, float]]


@dataclass(frozen=True)
class StudiedNet:
    """A net under analysis.

    Attributes:
        label: what plots and tables call it; no two have the same.
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
    """One evaluation.

    Attributes:
        key: what tells it from the others; its words are columns of the table, `net` the first of them.
        net: what is evaluated.
        change: context in which the net is changed; none = as it is.
        images: what is done to images first; none = nothing.
        score: what is measured; none = top-1 and cross-entropy, `ImageSet.score`.
    """

    key: Key
    net: nn.Module
    change: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    images: Change | None = None
    score: Score | None = None


@dataclass(frozen=True)
class Table:
    """Rows with the same keys, for a CSV file and the report."""

    name: str
    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Drawing:
    """A picture.

    Attributes:
        name: of its files, without ending.
        title: above it.
        alt: what it shows, in words, figures included, for those who do not see it.
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
    warnings: Sequence[Advice] = field(default=())


class Analysis(ABC):
    """A subclass is a frozen dataclass of settings that checks them when it is built.

    Attributes:
        name: of its files.
        split: whose images are evaluated by default: one that was trained on, calibrated on or chosen by says less; None = no images.
    """

    name: ClassVar[str]
    split: ClassVar[str | None] = "test"

    def points(self, nets: Sequence[StudiedNet], images: ImageSet) -> list[EvaluationPoint]:
        """All evaluations, those that are most wanted first.

        Raises:
            UsageError: a setting does not fit the nets.
        """
        return []

    def follow_up(self, nets: Sequence[StudiedNet], images: ImageSet, rows: Sequence[Row]) -> list[EvaluationPoint]:
        """Evaluations of what the results of `points` lead to; `rows` are all of them."""
        return []

    @abstractmethod
    def outcome(self, nets: Sequence[StudiedNet], rows: Sequence[Row]) -> Outcome:
        """What follows from the evaluations: keys of each point, `top1` (percent), `loss`, `seconds`. Some may be missing."""
