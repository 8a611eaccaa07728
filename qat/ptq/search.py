"""Evol-Q: search over the scales of a calibrated net, block by block, last block first. Paper: arXiv 2308.10814. See docs/methods.md."""

from __future__ import annotations

import fnmatch
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.evolution import (
    POPULATION,
    TOURNAMENT,
    Draw,
    best,
    draw,
    evolved_child,
    initial_population,
    insert,
    noise_radius,
)
from qat.functional.infonce import FITNESSES, TEMPERATURE, logit_fitness
from qat.model.scales import assert_ready
from qat.model.sites import CONTAINER, Site, find_blocks, iter_quantizers
from qat.ptq.runner import LOWEST_SCALE, Forward, Runner, RunOrder, patched
from qat.ptq.state import Progress
from qat.utils.probing import probing
from qat.utils.validate import check_bool, check_choice, check_globs, check_int, check_number

COLUMNS = ("pass", "block", "cycle", "fitness", "accepted", "seconds")
# The weights of attentions, whatever follows their name (LeViT: attn_downsample).
TARGETS = ("attn*.*.weight", "attn*.qk")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchSettings:
    """The knobs of `search/evolution.yaml`. Source of the numbers: Evol-Q and its code; see docs/methods.md.

    Attributes:
        passes: over all blocks, last block first.
        cycles: candidates per visit of a block.
        population: members of the evolution.
        tournament: how many of them compete to be a parent.
        radius: of the noise; None = 1e-4 for 8 bits, else 1e-3.
        relative: `radius` is a fraction of each scale, not in its unit.
        fitness: `infonce`, `mse`, `kl` or `cosine` of quantized and float logits.
        temperature: of `infonce`.
        targets: globs of the scales to change, seen from the block: `attn.qkv.weight`, `attn.qk`, `mlp.fc1.weight`, `mlp.fc1.input`.
        micro_batch: images that pass through the net at once.
        cache_gib: memory for the inputs of blocks, GiB; fewer blocks at a time are kept where all do not fit.
        seed: of all draws.
        reference_selection: keep what did best on validation images instead of calibration images, as the reference does.

    Raises:
        UsageError: a value that cannot work.
    """

    passes: int = 10
    cycles: int = 3
    population: int = POPULATION
    tournament: int = TOURNAMENT
    radius: float | None = None
    relative: bool = False
    fitness: str = "infonce"
    temperature: float = TEMPERATURE
    targets: tuple[str, ...] = TARGETS
    micro_batch: int = 10
    cache_gib: float = 4.0
    seed: int = 0
    reference_selection: bool = False

    def __post_init__(self) -> None:
        check_choice("search.fitness", self.fitness, FITNESSES)
        for name in ("passes", "cycles", "population", "tournament", "micro_batch"):
            check_int(f"search.{name}", getattr(self, name), 1)
        for name in ("relative", "reference_selection"):
            check_bool(f"search.{name}", getattr(self, name))
        check_int("search.seed", self.seed, 0)
        check_number("search.temperature", self.temperature, 0, above=True)
        check_number("search.cache_gib", self.cache_gib, 0)
        if self.radius is not None:
            check_number("search.radius", self.radius, 0, above=True)
        object.__setattr__(
            self, "targets", check_globs("search.targets", self.targets, "attn.qkv.weight")
        )


@dataclass(frozen=True)
class SearchResult:
    """What a search did.

    Attributes:
        selected_on: `calibration`, or `validation`: then accuracy on the validation images is no estimate for others.
        fitness_before: of the unchanged model.
        fitness: of the scales that the search ended with; those kept on validation images are not measured again.
        evaluations: candidates.
        accepted: of them, how many became the incumbent.
        seconds: all of it, runs before a resume too.
    """

    selected_on: str
    fitness_before: float
    fitness: float
    evaluations: int
    accepted: int
    seconds: float


@torch.no_grad()
def logits_of(net: nn.Module, images: Tensor, micro_batch: int) -> Tensor:
    """(N, classes) of images (N, C, H, W), some at a time, joined; a batch of 100 at once would fall out of the processor's caches.

    Raises:
        UsageError: the net gives something else, as a backbone does.
    """
    device = next(net.parameters()).device
    parts = [net(part.to(device)) for part in images.split(micro_batch)]
    if not isinstance(parts[0], Tensor) or parts[0].ndim != 2:
        raise UsageError(
            "search: the model must return logits (N, classes), which the fitness is computed from; calibrate takes models with any output"
        )
    return torch.cat(parts)


class ScaleVector:
    """Stored scales of several sites, one after the other, each flat; those inside offsets too."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.quantizers: list[Any] = [
            getattr(site.quantizer, "quantizer", site.quantizer) for site in sites
        ]

    def read(self) -> Tensor:
        """(n,) float64 on the CPU."""
        return torch.cat([
            quantizer.scale.detach().cpu().double().flatten() for quantizer in self.quantizers
        ])

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Put (n,) into the net, in its dtype; a scale is at least float32 eps."""
        parts = values.split([quantizer.n_scales for quantizer in self.quantizers])
        for quantizer, part in zip(self.quantizers, parts, strict=True):
            quantizer.set_scale(
                part.to(quantizer.scale).clamp(min=LOWEST_SCALE).view_as(quantizer.scale)
            )

    def radius(self, fixed: float | None) -> Tensor:
        """(n,) float64: `fixed`, or what suits the bits of each scale."""
        radii = [
            (q.n_scales, noise_radius(q.spec.bits) if fixed is None else fixed)
            for q in self.quantizers
        ]
        return torch.cat([torch.full((n,), radius, dtype=torch.float64) for n, radius in radii])


def scale_vectors(
    net: nn.Module, targets: Iterable[str], place: Mapping[str, int] = {}
) -> dict[str, ScaleVector]:
    """The vector of every block that has one, first block first.

    Args:
        net: quantized.
        targets: globs, see `SearchSettings.targets`.
        place: when each quantizer runs, by name: the order in a vector.

    Raises:
        UsageError: the net has no blocks, or no block a stored scale that the globs match.
    """
    blocks = find_blocks(net)
    if not blocks:
        raise UsageError(f"search: this model has no blocks in modules called {CONTAINER!r}")
    vectors: dict[str, ScaleVector] = {}
    known: set[str] = set()
    for block in blocks:
        inside = [
            site
            for site in iter_quantizers(net)
            if site.quantizer.n_scales and site.name.startswith(f"{block}.")
        ]
        called = {
            site: f"{site.layer.removeprefix(block)}.{site.role}".lstrip(".") for site in inside
        }
        known.update(called.values())
        chosen = [
            site
            for site in inside
            if any(fnmatch.fnmatchcase(called[site], glob) for glob in targets)
        ]
        if chosen:
            vectors[block] = ScaleVector(sorted(chosen, key=lambda site: place.get(site.name, 0)))
    if not vectors:
        stored = ", ".join(sorted(known)) or "nothing"
        raise UsageError(
            f"search.targets={list(targets)}: must match a scale of a block; stored scales are those of {stored}"
        )
    return vectors


class Evaluator:
    """Fitness of a net on calibration images while its scales change block by block.

    Args:
        net: quantized, in eval mode.
        batches: calibration images (N, C, H, W) each; a batch is never split for its fitness: its images are each other's negatives.
        targets: their float logits (N, classes).
        settings: of the search.

    Attributes:
        vectors: scales of each block, first block first.
        runner: `runner.forget()` has to be called when scales before the next block have changed.
    """

    def __init__(
        self,
        net: nn.Module,
        batches: Sequence[Tensor],
        targets: Sequence[Tensor],
        settings: SearchSettings,
    ) -> None:
        device = next(net.parameters()).device
        self.weights = [site for site in iter_quantizers(net) if site.is_weight]
        self.vectors = scale_vectors(
            net, settings.targets, RunOrder(net, batches[0][:1].to(device)).position
        )
        self.targets = [target.to(device) for target in targets]
        self.loss = logit_fitness(settings.fitness, settings.temperature)
        parts = [
            (j, part)
            for j, images in enumerate(batches)
            for part in images.to(device).split(settings.micro_batch)
        ]
        self.batch_of = [j for j, _ in parts]
        # The step of an activation may be read before its quantizer runs: an integer norm is made for it. That of a weight is not.
        entries = {
            name: [site.name for site in vector.sites]
            if all(site.is_weight for site in vector.sites)
            else [name]
            for name, vector in self.vectors.items()
        }
        self.runner = Runner(
            net, entries, [part for _, part in parts], settings.cache_gib * 2**30, to_the_end=True
        )

    @torch.no_grad()
    def fitness(self, block: str) -> float:
        """Mean over the batches, with the scales that the net has now; runs from `block` on."""
        logits: list[list[Tensor]] = [[] for _ in self.targets]
        place = self.runner.order.position
        later = [site for site in self.weights if place.get(site.layer, 0) > place[block]]
        # Weights are quantized once, not for every micro-batch.
        weights = {site.quantizer: site.quantizer(site.latent()) for site in later}
        fixed: dict[nn.Module, Forward] = {
            quantizer: lambda _, found=found: found for quantizer, found in weights.items()
        }
        with self.runner.at(block), patched(fixed):
            for i, j in enumerate(self.batch_of):
                logits[j].append(self.runner(i))
        losses = [
            self.loss(torch.cat(parts), target)
            for parts, target in zip(logits, self.targets, strict=True)
        ]
        return float(torch.stack(losses).double().mean())


def evolve(
    start: Tensor,
    fitness: float,
    evaluate: Callable[[int, Tensor], float],
    drawn: Callable[[int], Draw],
    settings: SearchSettings,
) -> tuple[Tensor, float]:
    """One visit: the winner of a tournament mutates, the worst member leaves. Source: Evol-Q's code.

    Args:
        start: scales (n,) to begin with.
        fitness: theirs.
        evaluate: gives the fitness of the candidate (n,) of a cycle.
        drawn: what is random in a cycle.
        settings: of the search.

    Returns:
        The best scales (n,) float64, never worse than `start`, and their fitness.
    """
    population = initial_population(start, fitness, settings.population)
    for cycle in range(settings.cycles):
        child = evolved_child(population, drawn(cycle), relative=settings.relative)
        population = insert(population, child, evaluate(cycle, child))
    return best(population)


@torch.no_grad()
def search(
    net: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[Tensor],
    settings: SearchSettings,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    run: Mapping[str, Any] | None = None,
    validate: Callable[[], float] | None = None,
) -> SearchResult:
    """Change the scales of a net for the better, in place; nothing else of it changes.

    Args:
        net: quantized, its scales filled; runs in eval mode, its mode is restored.
        batches: calibration images (N, C, H, W) each, as the net sees them.
        targets: float logits (N, classes) of each.
        settings: of the search.
        run_dir: folder of `search.csv` and `search.ckpt`, written after each visit; None = neither is written.
        resume: go on from `search.ckpt`, where there is one.
        run: see `Progress`.
        validate: accuracy of the net as it is on validation images; called after each visit under `reference_selection`.

    Raises:
        UsageError: nothing to search, or a fitness that is not finite.
    """
    if settings.fitness == "infonce" and min(map(len, batches)) < 2:
        raise UsageError(
            "search.fitness='infonce': requires ptq.batch of at least 2; here it must be one of mse, kl, cosine"
        )
    if settings.reference_selection and validate is None:
        raise UsageError("search.reference_selection=True: validation images are needed for it")
    assert_ready(net)
    tensors = [*net.state_dict().values(), *batches, *targets]
    progress = Progress(run_dir, "search", COLUMNS, settings, tensors, run)
    state = progress.resume() if resume else None
    with probing(net, ()):
        evaluator = Evaluator(net, batches, targets, settings)
        vectors = evaluator.vectors
        order = list(reversed(vectors))
        if state is None:
            state = _start(evaluator, order[0], progress)
        else:
            for name, values in state["scales"].items():
                vectors[name].write(values)
            log.info(
                "search resumed after %d visits, fitness %.6f", state["visits"], state["fitness"]
            )
        blocks = list(find_blocks(net))
        for number, name in [(number, name) for number in range(settings.passes) for name in order][
            state["visits"] :
        ]:
            if name == order[0]:
                evaluator.runner.forget()
            before = state["fitness"]
            _visit(evaluator, name, (number, blocks.index(name)), settings, state, progress)
            if settings.reference_selection and validate is not None:
                accuracy = validate()
                # The reference's rule: after the first pass the best accuracy stays, during it the latest.
                if number == 0 or accuracy > state["best"]["accuracy"]:
                    state["best"] = {
                        "accuracy": accuracy,
                        "scales": {n: vector.read() for n, vector in vectors.items()},
                    }
            progress.save(state)
            log.info(
                "search pass %d/%d %s: fitness %.6f -> %.6f",
                number + 1,
                settings.passes,
                name,
                before,
                state["fitness"],
            )
        if state["best"] is not None:
            for name, values in state["best"]["scales"].items():
                vectors[name].write(values)
    selected = "calibration" if state["best"] is None else "validation"
    return SearchResult(
        selected,
        *(
            state[key]
            for key in ("fitness_before", "fitness", "evaluations", "accepted", "seconds")
        ),
    )


def _start(evaluator: Evaluator, last: str, progress: Progress) -> dict[str, Any]:
    """The state of a search before its first visit: the net's own scales, measured."""
    began = time.perf_counter()
    fitness, seconds = evaluator.fitness(last), time.perf_counter() - began
    _check_fitness(fitness, "the unchanged model")
    progress.rows.append((0, "", "incumbent", fitness, 1, f"{seconds:.3f}"))
    counts = {"visits": 0, "evaluations": 0, "accepted": 0, "seconds": seconds}
    state: dict[str, Any] = {
        **counts,
        "fitness": fitness,
        "fitness_before": fitness,
        "scales": {},
        "best": None,
    }
    progress.save(state)
    return state


def _check_fitness(fitness: float, candidate: str) -> None:
    if not math.isfinite(fitness):
        raise UsageError(
            f"search: the fitness of {candidate} is {fitness}; its logits are not finite numbers"
        )


def _visit(
    evaluator: Evaluator,
    name: str,
    place: tuple[int, int],
    settings: SearchSettings,
    state: dict[str, Any],
    progress: Progress,
) -> None:
    """Search the scales of one block, and put the best of them into the net and the state."""
    began, vector = time.perf_counter(), evaluator.vectors[name]
    start, radius = vector.read(), vector.radius(settings.radius)
    lowest = state["fitness"]

    def evaluate(cycle: int, scales: Tensor) -> float:
        nonlocal lowest
        since = time.perf_counter()
        vector.write(scales)
        found = evaluator.fitness(name)
        _check_fitness(found, f"candidate {cycle} of block {name} in pass {place[0]}")
        accepted, lowest = found < lowest, min(found, lowest)
        state["evaluations"] += 1
        state["accepted"] += accepted
        progress.rows.append((
            place[0],
            name,
            cycle,
            found,
            int(accepted),
            f"{time.perf_counter() - since:.3f}",
        ))
        return found

    def drawn(cycle: int) -> Draw:
        return draw(
            settings.seed,
            (*place, cycle),
            len(radius),
            radius,
            size=settings.population,
            tournament=settings.tournament,
        )

    found, fitness = start, lowest
    try:
        found, fitness = evolve(start, lowest, evaluate, drawn, settings)
    finally:
        vector.write(found)
    state["visits"], state["fitness"] = state["visits"] + 1, fitness
    state["scales"][name] = vector.read()
    state["seconds"] += time.perf_counter() - began
