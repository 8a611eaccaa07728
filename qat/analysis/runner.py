"""Evaluate a net under a list of changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from qat.analysis.analysis import EvaluationPoint, Row
from qat.analysis.images import ImageSet
from qat.nn.execution import kept_weights
from qat.utils.probing import probing
from qat.utils.text import duration

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


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
