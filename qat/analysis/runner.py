"""Evaluate a list of points: cost said in advance, progress shown, nothing done twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import torch

from qat.analysis.analysis import EvaluationPoint, Row
from qat.analysis.images import ImageSet
from qat.analysis.ledger import Ledger
from qat.utils.probing import probing
from qat.utils.text import duration

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


def measure(points: Sequence[EvaluationPoint], images: ImageSet, ledger: Ledger) -> Iterator[Row]:
    """Rows in the order of the points: their keys, `top1`, `loss` and `seconds`; each is in the ledger before the next begins."""
    missing = [point for point in points if ledger.row(point.key) is None]
    if missing:
        log.info("%s", announcement(missing, images, len(points) - len(missing)))
    began = said = time.monotonic()
    done = 0
    for point in points:
        row = ledger.row(point.key)
        if row is None:
            row, done = ledger.record(point.key, evaluated(point, images)), done + 1
        if (now := time.monotonic()) - said > SECONDS_BETWEEN_LINES and done:
            left, said = (now - began) / done * (len(missing) - done), now
            log.info("%d of %d evaluations, about %s left", done, len(missing), duration(left))
        yield row


def evaluated(point: EvaluationPoint, images: ImageSet) -> dict[str, float]:
    """Top-1, loss and seconds of one point; the net is as before afterwards."""
    began = time.perf_counter()
    with probing(point.net, ()), point.change():
        found = point.score(point.net, images) if point.score else images.score(point.net, point.images)
    return {**found, "seconds": round(time.perf_counter() - began, 3)}


def announcement(points: Sequence[EvaluationPoint], images: ImageSet, done: int) -> str:
    """How many evaluations, how long they will take, and how much memory the images take; one batch of each net is timed."""
    pace = {id(point.net): point.net for point in points}
    per_image = {key: _seconds_per_image(net, images) for key, net in pace.items()}
    total = sum(per_image[id(point.net)] for point in points) * images.n_images
    before = f" ({done} done before)" if done else ""
    size = images.nbytes / 1e6
    return f"{len(points)} evaluations{before} of {images.n_images} {images.split} images, {size:.0f} MB in memory: about {duration(total)}"


def _seconds_per_image(net: torch.nn.Module, images: ImageSet) -> float:
    batch, _ = images.batches[0]
    with torch.no_grad():
        net(batch)
        began = time.perf_counter()
        float(net(batch).sum())  # waits for the device
    return (time.perf_counter() - began) / len(batch)
