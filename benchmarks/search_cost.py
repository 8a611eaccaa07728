"""How long one look at the calibration images takes during a search over scales, in float forwards of the same images.

Run by `make search-cost`: DeiT-T, W4A8 in FQ-ViT's placement, 100 random images as one batch, one thread. Everything is timed in turns,
round after round, so that a busy machine disturbs all alike; ratios are taken within a round, and their medians are printed.

    exact    the search's own evaluation: inputs of blocks and quantized weights remembered. The mean over all blocks.
    plain    a whole forward of the same quantized net, nothing remembered.
    racing   exact, but candidates that are clearly worse after 20 images are given up; another candidate every round.

`identical`: exact and plain give the same fitness of 20 images, bit for bit, for a candidate of every block. Weights are random: a
trained net may give up more or fewer of its candidates.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import qat
from qat.ptq import calibrate
from qat.ptq.blocks import Trace, trace
from qat.ptq.drivers import seeded_draws
from qat.ptq.fitness import Evaluator, logits_of, plain_fitness
from qat.ptq.ranks import Ranks
from qat.ptq.settings import SearchSettings
from qat.ptq.vector import ScaleVector, find_blocks, scale_vectors
from qat.ptq_spec import PtqRecipe

RACING_AFTER = 20


@dataclass
class Bench:
    """A float net and its quantized twin, and everything to evaluate them with."""

    net: nn.Module
    twin: nn.Module
    images: Tensor
    settings: SearchSettings
    exact: Evaluator
    racing: Evaluator
    vectors: dict[str, ScaleVector]
    traced: Trace

    def candidate(self, block: str, number: int) -> Tensor:
        """A mutation of the scales that a block has."""
        vector = self.vectors[block]
        place = (0, list(self.vectors).index(block), number)
        radius = vector.radius(self.settings.radius)
        return (vector.read() + seeded_draws(self.settings)(place, radius).noise).abs()


def build(model: str, n_images: int) -> Bench:
    """Random weights, random images; calibrated as `ptq=fqvit_w4a8` with minimum and maximum."""
    torch.manual_seed(0)
    net = timm.create_model(model).eval()
    images = torch.randn(n_images, *net.default_cfg["input_size"])
    twin = qat.convert(copy.deepcopy(net), PtqRecipe(bits=4, residual_observer="ptf"), input_size=tuple(images.shape[1:]))
    calibrate(twin, images.split(20)[:2])
    settings = SearchSettings(racing=RACING_AFTER)
    targets = [logits_of(net, images, settings.micro_batch)]
    traced = trace(twin.eval(), find_blocks(twin), images[:1])
    vectors = scale_vectors(twin, settings.targets, traced.order)
    exact, racing = (Evaluator(twin, [images], targets, SearchSettings(racing=n), traced, Ranks()) for n in (0, RACING_AFTER))
    racing.weights, racing.prefixes = exact.weights, exact.prefixes
    return Bench(net, twin, images, settings, exact, racing, vectors, traced)


def seconds(function: Callable[[], object]) -> float:
    """Time of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def with_candidate(bench: Bench, block: str, number: int, look: Callable[[], object]) -> float:
    """Time of one look at a candidate, putting it into the net included; the net is as before afterwards."""
    vector = bench.vectors[block]
    start, candidate = vector.read(), bench.candidate(block, number)

    def evaluate() -> None:
        vector.write(candidate)
        bench.exact.changed(vector)
        look()

    took = seconds(evaluate)
    vector.write(start)
    bench.exact.changed(vector)
    return took


def one_round(bench: Bench, number: int, rows: Tensor) -> dict[str, float]:
    """Seconds of every kind of look, in turns."""
    size, took = bench.settings.micro_batch, {"float": [], "exact": [], "racing": []}
    for block in reversed(bench.vectors):
        # The float forward is timed before every block: the machine may be busier at the end of a round than at its start.
        took["float"].append(seconds(lambda: logits_of(bench.net, bench.images, size)))
        took["exact"].append(with_candidate(bench, block, number, lambda block=block: bench.exact.fitness(block)))
        took["racing"].append(with_candidate(bench, block, number, lambda block=block: bench.racing.fitness(block, rows)))
    found = {name: statistics.mean(values) for name, values in took.items()}
    found["float at once"] = seconds(lambda: logits_of(bench.net, bench.images, len(bench.images)))
    return found


def measure(bench: Bench, rounds: int) -> list[dict[str, float]]:
    """Seconds per round; first rounds warm up and are not counted."""
    last = next(reversed(bench.vectors))
    found = []
    for number in range(rounds + 1):
        plain = [seconds(lambda: plain_fitness(bench.twin, [bench.images], list(bench.exact.targets.values()), bench.settings))]
        with bench.exact.active():
            bench.exact.fitness(last)
            rows = bench.racing.fitness(last).rows
            found.append(one_round(bench, number, rows) | {"plain": statistics.mean(plain)})
    return found[1:]


def identical(bench: Bench) -> bool:
    """Do exact and plain agree to the last bit on some of the images, for a candidate of every block?"""
    images = bench.images[: 2 * bench.settings.micro_batch]
    targets = logits_of(bench.net, images, bench.settings.micro_batch)
    exact = Evaluator(bench.twin, [images], [targets], bench.settings, bench.traced, Ranks())
    same = []
    for block, vector in bench.vectors.items():
        start = vector.read()
        vector.write(bench.candidate(block, 0))
        with exact.active():
            found = exact.fitness(block).fitness
        same.append(found == plain_fitness(bench.twin, [images], [targets], bench.settings))
        vector.write(start)
    return all(same)


def machine() -> str:
    """What the processor calls itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        bench = build(args.model, args.images)
        found, same = measure(bench, args.rounds), identical(bench)
    print(f"{machine()}, {args.threads} thread(s), torch {torch.__version__}")
    print(f"{args.model}, {args.images} images, micro-batches of {bench.settings.micro_batch}, {args.rounds} rounds")
    for name in found[0]:
        print(f"{name:14s} {statistics.median(row[name] for row in found):8.3f} s")
    for name in ("exact", "plain", "racing"):
        at_once = statistics.median(row[name] / row["float at once"] for row in found)
        print(f"{name:14s} {at_once:8.3f} float forwards of the whole batch at once")
    ratio = {name: statistics.median(row[name] / row["float"] for row in found) for name in ("exact", "plain", "racing")}
    print(" ".join(f"{name} {value:.3f}" for name, value in ratio.items()), f"identical {str(same).lower()}")


if __name__ == "__main__":
    main()
