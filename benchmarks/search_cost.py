"""How long one look at the calibration images takes during a search over scales, in float forwards of the same images.

Run by `make search-cost`: DeiT-T or DeiT-S, W4A8 in FQ-ViT's placement, 100 images as one batch, one thread. Everything is timed in turns,
round after round, so that a busy machine disturbs all alike; ratios are taken within a round, and their medians are printed.

    exact    the search's own evaluation: what runs in front of the first scale that changes and quantized weights are remembered. The
             mean over all blocks.
    plain    a whole forward of the same quantized net, nothing remembered.
    racing   exact, but candidates that are clearly worse are given up, after 10 images at the earliest; another candidate every round.

`identical`: exact and plain give the same fitness of 20 images, bit for bit, for a candidate of every block.

How soon a race is lost depends on the net. The images belong to ten classes (coarse patterns under noise), and the net is trained on such
images first, with most patches left out, or read from `--ckpt`; then a search brings it to where few candidates are better. Candidates are
the search's own: its first scales changed by its noise.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.model.blocks import find_blocks
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import calibrate
from qat.ptq.block_cache import Trace, trace, verified
from qat.ptq.distributed import Ranks
from qat.ptq.drivers import seeded_draws
from qat.ptq.fitness import Evaluation, Evaluator, logits_of, plain_fitness
from qat.ptq.search import search
from qat.ptq.search_settings import SearchSettings
from qat.ptq.vector import ScaleVector, scale_vectors

RACING_AFTER = 10
CLASSES = 10
COARSE = 8
WARMUP = 20


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


def patterned(n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, size, size) and their classes (n,): a coarse pattern for each class, of random contrast, under noise."""
    patterns = torch.randn(CLASSES, 3, COARSE, COARSE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    contrast = torch.rand(n, 1, 1, 1, generator=generator) + 0.5
    coarse = patterns[labels] * contrast + 0.7 * torch.randn(n, 3, COARSE, COARSE, generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * torch.randn(n, 3, size, size, generator=generator)
    return images, labels


def trained(model: str, steps: int) -> nn.Module:
    """A net that tells the patterns apart, for a start; three quarters of the patches are left out while it learns."""
    torch.manual_seed(0)
    net = timm.create_model(model, patch_drop_rate=0.75)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    with torch.enable_grad():
        for step in range(steps):
            images, labels = patterned(32, net.default_cfg["input_size"][-1], 1000 + step)
            loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            warmup.step()
            if (step + 1) % 50 == 0 or step + 1 == steps:
                print(f"trained for {step + 1} steps, cross-entropy {loss.item():.3f}", flush=True)
    whole = timm.create_model(model)
    whole.load_state_dict(net.state_dict())
    return whole


def build(args: argparse.Namespace) -> Bench:
    """Calibrated as `ptq=fqvit_w4a8` with minimum and maximum, then searched."""
    net = timm.create_model(args.model) if args.ckpt else trained(args.model, args.steps)
    if args.ckpt:
        load_checkpoint(net, args.ckpt)
    images = patterned(args.images, net.eval().default_cfg["input_size"][-1], 1)[0]
    twin = qat.convert(copy.deepcopy(net), PtqRecipe(bits=4, residual_observer="ptf"), input_size=tuple(images.shape[1:]))
    calibrate(twin, images.split(20)[:2])
    settings = SearchSettings(racing=RACING_AFTER)
    targets = [logits_of(net, images, settings.micro_batch)]
    if args.passes:
        found = search(twin, [images], targets, SearchSettings(racing=RACING_AFTER, passes=args.passes, seed=1))
        print(f"searched: {found.accepted} of {found.evaluations} accepted, {found.given_up} given up, {found.images} images", flush=True)
    traced = trace(twin.eval(), find_blocks(twin), images[:1])
    vectors = scale_vectors(twin, settings.targets, traced.order)
    inner = traced.entering({name: [site.name for site in vector.sites] for name, vector in vectors.items()})
    traced = verified(twin, traced, images[:2], inner)
    exact, racing = (Evaluator(twin, [images], targets, SearchSettings(racing=n), traced, Ranks()) for n in (0, RACING_AFTER))
    racing.weights, racing.prefixes = exact.weights, exact.prefixes
    return Bench(net, twin, images, settings, exact, racing, vectors, traced)


@dataclass(frozen=True)
class Seconds:
    """Time of one call: by the clock, and of the processor."""

    wall: float
    cpu: float


def timed(function: Callable[[], object]) -> Seconds:
    """Time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def mean(values: list[Seconds]) -> Seconds:
    """Of both."""
    return Seconds(statistics.mean(v.wall for v in values), statistics.mean(v.cpu for v in values))


def with_candidate(bench: Bench, block: str, number: int, look: Callable[[], Evaluation]) -> tuple[Seconds, Evaluation]:
    """One look at a candidate, putting it into the net included; the net is as before afterwards."""
    vector, found = bench.vectors[block], []
    start, candidate = vector.read(), bench.candidate(block, number)

    def evaluate() -> None:
        vector.write(candidate)
        bench.exact.changed(vector)
        found.append(look())

    took = timed(evaluate)
    vector.write(start)
    bench.exact.changed(vector)
    return took, found[0]


@dataclass
class Races:
    """What became of the candidates."""

    run: int = 0
    better: int = 0
    given_up: int = 0
    wrongly: int = 0
    images: int = 0

    def count(self, incumbent: float, exact: Evaluation, raced: Evaluation) -> None:
        """Add a candidate."""
        better, given_up = exact.fitness < incumbent, raced.images < exact.images
        self.run, self.better, self.given_up = self.run + 1, self.better + better, self.given_up + given_up
        self.wrongly, self.images = self.wrongly + (better and given_up), self.images + raced.images


def one_round(bench: Bench, number: int, races: Races) -> dict[str, Seconds]:
    """Times of every kind of look, in turns."""
    size, took = bench.settings.micro_batch, {"float": [], "exact": [], "racing": []}
    incumbent = bench.racing.fitness(next(reversed(bench.vectors)))
    for block in reversed(bench.vectors):
        # The float forward is timed before every block: the machine may be busier at the end of a round than at its start.
        took["float"].append(timed(lambda: logits_of(bench.net, bench.images, size)))
        seconds, exact = with_candidate(bench, block, number, lambda block=block: bench.exact.fitness(block))
        took["exact"].append(seconds)
        seconds, raced = with_candidate(bench, block, number, lambda block=block: bench.racing.fitness(block, incumbent.rows))
        took["racing"].append(seconds)
        races.count(incumbent.fitness, exact, raced)
    found = {name: mean(values) for name, values in took.items()}
    found["float at once"] = timed(lambda: logits_of(bench.net, bench.images, len(bench.images)))
    return found


def measure(bench: Bench, rounds: int) -> tuple[list[dict[str, Seconds]], Races]:
    """Times per round; what warms up is not counted."""
    targets, found, races = list(bench.exact.targets.values()), [], Races()
    logits_of(bench.net, bench.images, bench.settings.micro_batch)
    for number in range(rounds):
        plain = timed(lambda: plain_fitness(bench.twin, [bench.images], targets, bench.settings))
        with bench.exact.active():
            bench.exact.fitness(next(reversed(bench.vectors)))
            found.append(one_round(bench, number, races) | {"plain": plain})
    return found, races


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


def report(args: argparse.Namespace, found: list[dict[str, Seconds]], races: Races) -> None:
    """All but the last line."""
    micro_batch = SearchSettings().micro_batch
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{machine()}, {args.threads} thread(s), torch {torch.__version__}, load average {load}")
    print(f"{args.model}, {args.images} images, micro-batches of {micro_batch}, {args.rounds} rounds")
    for name in found[0]:
        print(
            f"{name:14s} {statistics.median(r[name].wall for r in found):8.3f} s {statistics.median(r[name].cpu for r in found):8.3f} s CPU"
        )
    shares = f"{races.better} of {races.run} better, {races.given_up} given up, {races.wrongly} wrongly"
    print(f"candidates: {shares}; racing ran {races.images / (races.run * args.images):.3f} of the images")
    for title, other, kind in (
        ("whole batch at once", "float at once", "wall"),
        ("rounds, lowest", "float", "low"),
        ("CPU time", "float", "cpu"),
    ):
        print(f"{title}: {ratios(found, other, kind)}")


def ratios(found: list[dict[str, Seconds]], other: str, kind: str) -> str:
    """What everything takes, in float forwards: the median over rounds of the ratio within a round, or the lowest."""
    middle, unit = (min, "wall") if kind == "low" else (statistics.median, kind)
    names = ("exact", "plain", "racing")
    return " ".join(f"{name} {middle(getattr(r[name], unit) / getattr(r[other], unit) for r in found):.3f}" for name in names)


def main() -> None:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--ckpt", help="weights of that timm model, in the place of a short training")
    parser.add_argument("--steps", type=int, default=150, help="of the training")
    parser.add_argument("--passes", type=int, default=2, help="of the search that goes before")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        bench = build(args)
        (found, races), same = measure(bench, args.rounds), identical(bench)
    report(args, found, races)
    print(ratios(found, "float", "wall"), f"identical {str(same).lower()}")


if __name__ == "__main__":
    main()
