"""How long one evaluation of the calibration images takes during a search over scales, in float forwards of the same images.

Run by `make search-cost`: DeiT-T or DeiT-S, W4A8 in FQ-ViT's placement, 100 images as one batch, one thread. Everything is timed in turns,
round after round, so that a busy machine disturbs all alike; ratios are taken within a round, and their medians are printed.

    exact    the search's own evaluation: what runs in front of the first scale that changes and quantized weights are remembered. The
             mean over all blocks.
    plain    a whole forward of the same quantized net, nothing remembered.
    racing   exact, but candidates that are clearly worse are given up, after 10 images at the earliest; another candidate every round. It
             holds for nets of this stage of a search, where most candidates are worse: earlier ones are given up less often, and the
             few candidates of a run say nothing of how many are given up wrongly (docs/evolq.md has that of 396).

`identical`: exact and plain give the same fitness of 20 images, bit for bit, for a candidate of every block.

How soon a race is lost depends on the net. The images belong to ten classes (coarse patterns under noise), and the net is trained on such
images first, with most patches left out, or read from `--ckpt`; then a search brings it to where few candidates are better. Candidates are
the search's own: its first scales changed by its noise.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from evidence.timing import environment, timed
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
CLASSES, COARSE, WARMUP = 10, 8, 20
Seconds = tuple[float, float]  # of the process, by the clock


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
        return (vector.read() + seeded_draws(self.settings)(place, vector.radius(self.settings.radius)).noise).abs()

    def evaluate(self, block: str, number: int, evaluation: Callable[[], Evaluation]) -> tuple[Seconds, Evaluation]:
        """Time and fitness of a candidate, putting it into the net included; the net is as before afterwards."""
        vector, found = self.vectors[block], []
        start, candidate = vector.read(), self.candidate(block, number)

        def run() -> None:
            vector.write(candidate)
            self.exact.changed(vector)
            found.append(evaluation())

        took = timed(run)
        vector.write(start)
        self.exact.changed(vector)
        return took, found[0]


def patterned(n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, size, size) and their classes (n,): a coarse pattern for each class, of random contrast, under noise."""
    patterns = torch.randn(CLASSES, 3, COARSE, COARSE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    contrast = torch.rand(n, 1, 1, 1, generator=generator) + 0.5
    coarse = patterns[labels] * contrast + 0.7 * torch.randn(n, 3, COARSE, COARSE, generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * torch.randn(n, 3, size, size, generator=generator)
    return images, labels


@torch.enable_grad()
def trained(model: str, steps: int) -> nn.Module:
    """A net that tells the patterns apart, for a start; three quarters of the patches are left out while it learns."""
    torch.manual_seed(0)
    net = timm.create_model(model, patch_drop_rate=0.75)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    for step in range(steps):
        images, labels = patterned(32, net.default_cfg["input_size"][-1], 1000 + step)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        warmup.step()
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


def one_round(bench: Bench, number: int) -> tuple[dict[str, list[Seconds]], list[tuple[float, Evaluation, Evaluation]]]:
    """Times of every kind of evaluation, in turns, and the fitness of each candidate: before, exact, raced."""
    took: dict[str, list[Seconds]] = {"float": [], "exact": [], "racing": []}
    races = []
    incumbent = bench.racing.fitness(next(reversed(bench.vectors)))
    for block in reversed(bench.vectors):
        # The float forward is timed before every block: the machine may be busier at the end of a round than at its start.
        took["float"].append(timed(lambda: logits_of(bench.net, bench.images, bench.settings.micro_batch)))
        seconds, exact = bench.evaluate(block, number, lambda block=block: bench.exact.fitness(block))
        took["exact"].append(seconds)
        seconds, raced = bench.evaluate(block, number, lambda block=block: bench.racing.fitness(block, incumbent.rows))
        took["racing"].append(seconds)
        races.append((incumbent.fitness, exact, raced))
    took["float at once"] = [timed(lambda: logits_of(bench.net, bench.images, len(bench.images)))]
    return took, races


def measure(bench: Bench, rounds: int) -> tuple[list[dict[str, Seconds]], list[tuple[float, Evaluation, Evaluation]]]:
    """Mean times per round, and all races; what warms up is not counted."""
    targets, found, races = list(bench.exact.targets.values()), [], []
    logits_of(bench.net, bench.images, bench.settings.micro_batch)
    for number in range(rounds):
        plain = timed(lambda: plain_fitness(bench.twin, [bench.images], targets, bench.settings))
        with bench.exact.active():
            bench.exact.fitness(next(reversed(bench.vectors)))
            took, raced = one_round(bench, number)
        races += raced
        means = {name: tuple(map(statistics.mean, zip(*seconds, strict=True))) for name, seconds in took.items()}
        found.append({**means, "plain": plain})
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


def ratios(found: list[dict[str, Seconds]], base: str, clock: int) -> str:
    """What everything takes, in float forwards: the median over rounds of the ratio within a round."""
    names = ("exact", "plain", "racing")
    return " ".join(f"{name} {statistics.median(r[name][clock] / r[base][clock] for r in found):.3f}" for name in names)


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
    print(f"{environment()}\n{args.model}, {args.images} images, micro-batches of {bench.settings.micro_batch}, {args.rounds} rounds")
    for name in found[0]:
        cpu, wall = (statistics.median(r[name][clock] for r in found) for clock in (0, 1))
        print(f"{name:14s} {wall:8.3f} s {cpu:8.3f} s CPU")
    better = [exact.fitness < before for before, exact, _ in races]
    given_up = [raced.images < exact.images for _, exact, raced in races]
    wrongly, images = sum(map(all, zip(better, given_up, strict=True))), sum(raced.images for *_, raced in races)
    print(f"candidates: {sum(better)} of {len(races)} better, {sum(given_up)} given up, {wrongly} wrongly; ", end="")
    print(f"racing ran {images / (len(races) * args.images):.3f} of the images")
    print(f"whole batch at once: {ratios(found, 'float at once', 1)}\nCPU time: {ratios(found, 'float', 0)}")
    print(ratios(found, "float", 1), f"identical {str(same).lower()}")


if __name__ == "__main__":
    main()
