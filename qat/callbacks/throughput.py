"""Lightning's throughput monitor, told how to count a batch of (images, targets)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ThroughputMonitor


def _images(batch: Any) -> int:
    return len(batch[0])


class Throughput(ThroughputMonitor):
    """Images per second in the logs.

    Args:
        window_size: steps over which the rate is averaged.
    """

    def __init__(self, window_size: int = 100) -> None:
        super().__init__(batch_size_fn=_images, window_size=window_size)
