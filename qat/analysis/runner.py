"""Evaluate a list of points: cost said in advance, progress shown, nothing done twice."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qat.analysis.analysis import EvaluationPoint, Row
from qat.analysis.images import ImageSet
from qat.analysis.ledger import Ledger
from qat.ptq.weight_cache import WeightCache

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


def measure(points: Sequence[EvaluationPoint], images: ImageSet, ledger: Ledger) -> Iterator[Row]:
    """Rows in the order of the points: their keys, `top1`, `loss` and `seconds`; each is in the ledger before the next begins."""
    missing = [point for point in points if ledger.row(point.key) is None]
    if missing:
        log.info("%s", announcement(missing, images, len(points) - len(missing)))
    tick = _Ticker(len(missing))
    with tick:
        for point in points:
            row = ledger.row(point.key)
            if row is None:
                row = ledger.record(point.key, evaluated(point, images))
                tick.step()
            yield row


def evaluated(point: EvaluationPoint, images: ImageSet) -> dict[str, float]:
    """Top-1, loss and seconds of one point; the net is as before afterwards."""
    began = time.perf_counter()
    modes = [(module, module.training) for module in point.net.modules()]
    try:
        point.net.eval()
        with torch.no_grad(), point.change(), WeightCache(point.net).active():
            found = point.score(point.net, images) if point.score else images.score(point.net, point.images)
    finally:
        for module, mode in modes:
            module.training = mode
    return {**found, "seconds": round(time.perf_counter() - began, 3)}


def announcement(points: Sequence[EvaluationPoint], images: ImageSet, done: int) -> str:
    """How many evaluations, how long they will take, and how much memory the images take; one batch of each net is timed."""
    pace = {id(point.net): point.net for point in points}
    per_image = {key: _seconds_per_image(net, images) for key, net in pace.items()}
    total = sum(per_image[id(point.net)] for point in points) * images.n_images
    before = f" ({done} done before)" if done else ""
    size = images.nbytes / 1e6
    return f"{len(points)} evaluations{before} of {images.n_images} {images.split} images, {size:.0f} MB in memory: about {spoken(total)}"


def spoken(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _seconds_per_image(net: torch.nn.Module, images: ImageSet) -> float:
    batch, _ = images.batches[0]
    with torch.no_grad(), WeightCache(net).active():
        net(batch)
        began = time.perf_counter()
        float(net(batch).sum())  # waits for the device
    return (time.perf_counter() - began) / len(batch)


class _Ticker:
    """A bar on a terminal, else a line now and then."""

    def __init__(self, total: int) -> None:
        columns = (
            TextColumn("evaluations"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, transient=True) if sys.stdout.isatty() and total else None
        self._task = self._bar.add_task("", total=total) if self._bar else None
        self._total, self._done = total, 0
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> _Ticker:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if self._bar and self._task is not None:
            self._bar.advance(self._task)
        elif now - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = now
            left = (now - self._began) / self._done * (self._total - self._done)
            log.info("%d of %d evaluations, about %s left", self._done, self._total, spoken(left))
