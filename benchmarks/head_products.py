"""Products of attention whose heads lie side by side: image by image in place, or all images at once and moved there. Where to change over.

python -m benchmarks.head_products. One thread; both ways take turns; medians of ratios.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from benchmarks.step_arms import environment, table
from qat.kernels.fused import heads

ROUNDS = 31
HEADS = 3
SHAPES = ((128, 16, 32), (128, 17, 64), (64, 50, 64), (16, 64, 32), (32, 81, 64), (16, 100, 64), (8, 197, 64), (512, 49, 32))


def seconds(a: Tensor, b: Tensor, out: Tensor, large: int) -> float:
    """Of one product of all heads."""
    heads.LARGE = large
    start = time.perf_counter()
    heads.product(a, b, out)
    return time.perf_counter() - start


def ratio(batch: int, tokens: int, channels: int) -> float:
    """Time at once and moved, in times of image by image."""
    a, b = torch.randn(HEADS, batch, tokens, tokens), torch.randn(batch, tokens, HEADS * channels)
    out = heads.heads_of(torch.empty_like(b), HEADS)
    b = heads.heads_of(b, HEADS)
    turns = [(seconds(a, b, out, tokens * channels + 1), seconds(a, b, out, 0)) for _ in range(ROUNDS)]
    return statistics.median(moved / in_place for moved, in_place in turns)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        [f"{batch} x {tokens} x {channels}", str(tokens * channels), f"{ratio(batch, tokens, channels):.2f}"]
        for batch, tokens, channels in SHAPES
    ]
    print(environment())
    print(table(["images x tokens x channels of a head", "elements of an image", "moved : in place"], rows))


if __name__ == "__main__":
    main()
