"""Evol-Q: a search over the scales of a quantized net, block by block, last block first.

Paper: arXiv 2308.10814. See docs/methods.md.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
    best_candidate,
    draw,
    evolve_child,
    initial_population,
    insert_child,
)
from qat.functional.infonce import FITNESSES, TEMPERATURE, logit_fitness
from qat.model.scales import assert_ready
from qat.model.sites import find_blocks, iter_quantizers
from qat.ptq.runner import Forward, Runner, RunOrder, patch_forwards
from qat.ptq.scale_vectors import scale_vectors
from qat.ptq.state import Progress
from qat.utils.probing import probing
from qat.utils.validate import check_bool, check_choice, check_globs, check_int, check_number

COLUMNS = ("pass", "block", "cycle", "fitness", "accepted", "seconds")
# Attention weights; the name of an attention may have a suffix (LeViT: attn_downsample).
TARGETS = ("attn*.*.weight", "attention.*.weight", "self_attn.*.weight", "attn*.qk")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchSettings:
    """Settings of `search/evolution.yaml`.

    Source of the defaults: Evol-Q and its code; see docs/methods.md.

    Attributes:
        passes: number of passes over all blocks, last block first.
        cycles: number of candidates each time a block is searched.
        population: number of members of the population.
        tournament: number of members that compete to be a parent.
        radius: radius of the noise; None = 1e-4 for 8 bits, else 1e-3.
        relative: True = `radius` is a fraction of each scale; False = an absolute number.
        fitness: `infonce`, `mse`, `kl` or `cosine`, a loss between quantized and float logits:
            lower is better.
        temperature: temperature of `infonce`.
        targets: globs of the scales to change, by names inside a block: `attn.qkv.weight`,
            `attn.qk`, `mlp.fc1.weight`, `mlp.fc1.input`.
        micro_batch: number of images that pass through the net at once.
        cache_gib: size of the cache, in GiB. It contains the inputs of one block, whatever their
            size, and of as many blocks before it as fit.
        seed: seed of all random numbers.
        reference_selection: True = the final scales are chosen by accuracy on validation images, as
            in the reference code.

    Raises:
        UsageError: a value is not allowed.
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
        check_number("search.temperature", self.temperature, 0, exclusive_lowest=True)
        check_number("search.cache_gib", self.cache_gib, 0)
        if self.radius is not None:
            check_number("search.radius", self.radius, 0, exclusive_lowest=True)
        targets = check_globs("search.targets", self.targets, "attn.qkv.weight")
        object.__setattr__(self, "targets", targets)


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        selected_on: images on which scales were selected: `calibration` or `validation`. With
            `validation`, the accuracy on these images does not estimate the accuracy on others.
        fitness_before: fitness of the unchanged model.
        fitness: fitness at the end of the search, even if other scales were selected on validation
            images.
        evaluations: number of candidates.
        accepted: number of candidates with a lower fitness than all scales before.
        seconds: time to compute fitness, including runs before a resume.
    """

    selected_on: str
    fitness_before: float
    fitness: float
    evaluations: int
    accepted: int
    seconds: float


@torch.no_grad()
def logits_of(net: nn.Module, images: Tensor, micro_batch: int) -> Tensor:
    """Logits (N, classes) of images (N, C, H, W).

    Images run in micro-batches, because a large batch would not fit in a processor's caches.

    Raises:
        UsageError: the net does not return logits (a backbone, for example).
    """
    device = next(net.parameters()).device
    parts = [net(part.to(device)) for part in images.split(micro_batch)]
    if not isinstance(parts[0], Tensor) or parts[0].ndim != 2:
        raise UsageError(
            "search: the model must return logits (N, classes), from which the fitness is "
            "computed; calibration without a search takes models with any output"
        )
    return torch.cat(parts)


class Evaluator:
    """Fitness of a net on calibration images while its scales change block by block.

    Args:
        net: a quantized net in eval mode.
        batches: calibration images (N, C, H, W) each. The fitness is computed on whole batches,
            because `infonce` compares each image with the other images of its batch.
        float_logits: (N, classes) of each batch.
        settings: settings of the search.

    Attributes:
        vectors: scales to search, by block name, first block first.
        runner: runner of the net. Call `runner.clear_cache()` if scales changed in a block whose
            outputs are cached.

    Raises:
        UsageError: there is no scale to search.
    """

    def __init__(
        self,
        net: nn.Module,
        batches: Sequence[Tensor],
        float_logits: Sequence[Tensor],
        settings: SearchSettings,
    ) -> None:
        device = next(net.parameters()).device
        self.weights = [site for site in iter_quantizers(net) if site.is_weight]
        order = RunOrder(net, batches[0][:1].to(device))
        self.vectors = scale_vectors(net, settings.targets, order.position)
        self.float_logits = [target.to(device) for target in float_logits]
        self.loss = logit_fitness(settings.fitness, settings.temperature)
        micro_batches: list[Tensor] = []
        # For each micro-batch, the index of its batch.
        self.batch_indices: list[int] = []
        for index, images in enumerate(batches):
            for micro_batch in images.to(device).split(settings.micro_batch):
                micro_batches.append(micro_batch)
                self.batch_indices.append(index)
        entries = {name: self._cache_entries(name) for name in self.vectors}
        cache_bytes = settings.cache_gib * 2**30
        self.runner = Runner(net, entries, micro_batches, cache_bytes, needs_net_output=True)

    def _cache_entries(self, block: str) -> list[str]:
        """Candidates for the entry of a block; see `Runner`."""
        sites = self.vectors[block].sites
        if all(site.is_weight for site in sites):
            return [site.name for site in sites]
        # An integer norm may read the step of an activation quantizer before the quantizer runs, so
        # cache no outputs inside the block.
        return [block]

    def write(self, scales: Mapping[str, Tensor]) -> None:
        """Set the scales of the named blocks, (n,) each."""
        for name, values in scales.items():
            self.vectors[name].write(values)

    @torch.no_grad()
    def fitness(self, block: str) -> float:
        """Mean fitness of the current scales over all batches; runs from `block` on if possible."""
        position = self.runner.order.position
        # Weights are quantized once, not for every micro-batch.
        fixed_weights: dict[nn.Module, Forward] = {}
        for site in self.weights:
            if position.get(site.layer, 0) > position[block]:
                fixed_weights[site.quantizer] = _constant_forward(site.quantizer(site.latent()))
        logits: list[list[Tensor]] = [[] for _ in self.float_logits]
        with self.runner.at(block), patch_forwards(fixed_weights):
            for i, batch_index in enumerate(self.batch_indices):
                logits[batch_index].append(self.runner(i))
        losses = []
        for parts, target in zip(logits, self.float_logits, strict=True):
            losses.append(self.loss(torch.cat(parts), target))
        return float(torch.stack(losses).double().mean())


def _constant_forward(value: Tensor) -> Forward:
    return lambda _: value


def evolve(
    initial_scales: Tensor,
    fitness: float,
    evaluate: Callable[[int, Tensor], float],
    draw_cycle: Callable[[int], Draw],
    settings: SearchSettings,
) -> tuple[Tensor, float]:
    """Search the scales of one block once.

    Each cycle adds the mutated winner of a tournament, and drops the candidate with the highest
    fitness, which may be the new one.

    Source: Evol-Q's code.

    Args:
        initial_scales: initial scales (n,).
        fitness: fitness of `initial_scales`, a loss: lower is better.
        evaluate: returns the fitness of a candidate (n,), given the cycle and the candidate.
        draw_cycle: returns the random numbers of a cycle.
        settings: settings of the search.

    Returns:
        The best scales (n,) float64, never worse than `initial_scales`, and their fitness.
    """
    population = initial_population(initial_scales, fitness, settings.population)
    for cycle in range(settings.cycles):
        child = evolve_child(population, draw_cycle(cycle), relative=settings.relative)
        population = insert_child(population, child, evaluate(cycle, child))
    return best_candidate(population)


def _check_arguments(
    batches: Sequence[Tensor], settings: SearchSettings, validate: Callable[[], float] | None
) -> None:
    if not batches:
        raise UsageError("search: batches is empty; must contain at least one batch of images")
    if settings.fitness == "infonce" and min(map(len, batches)) < 2:
        raise UsageError(
            "search.fitness='infonce': requires ptq.batch of at least 2; "
            "must be one of mse, kl, cosine with ptq.batch=1"
        )
    if settings.reference_selection and validate is None:
        raise UsageError("search.reference_selection=true: must be false without validation images")


@torch.no_grad()
def search(
    net: nn.Module,
    batches: Sequence[Tensor],
    float_logits: Sequence[Tensor],
    settings: SearchSettings,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    run: Mapping[str, Any] | None = None,
    validate: Callable[[], float] | None = None,
) -> SearchResult:
    """Improve the scales of a net in place; nothing else of the net changes.

    Args:
        net: a quantized net whose scales are set. It runs in eval mode, and its mode is restored
            afterwards.
        batches: calibration images (N, C, H, W) each, preprocessed.
        float_logits: (N, classes) of each batch.
        settings: settings of the search.
        run_dir: folder of `search.csv` and `search.ckpt`, written after each block; None = write no
            files.
        resume: resume from `search.ckpt`, if the file exists.
        run: settings of the whole run; see `Progress`.
        validate: returns the current accuracy of the net on validation images; called after each
            block with `reference_selection`, else unused.

    Raises:
        UsageError: there is no scale to search, a scale is unset, a fitness is not finite, a
            setting does not fit the arguments, or `search.ckpt` cannot be used.
    """
    _check_arguments(batches, settings, validate)
    assert_ready(net)
    tensors = [*net.state_dict().values(), *batches, *float_logits]
    progress = Progress(run_dir, "search", COLUMNS, settings, tensors, run)
    state = progress.resume() if resume else None
    with probing(net, ()):
        evaluator = Evaluator(net, batches, float_logits, settings)
        order = list(reversed(evaluator.vectors))
        if state is None:
            state = _initial_state(evaluator, order[0], progress)
        else:
            evaluator.write(state["scales"])
            log.info(
                "search resumed after %d of %d block searches, fitness %.6f",
                state["visits"],
                settings.passes * len(order),
                state["fitness"],
            )
        blocks = list(find_blocks(net))
        block_searches = list(itertools.product(range(settings.passes), order))
        for pass_index, name in block_searches[state["visits"] :]:
            if name == order[0]:
                evaluator.runner.clear_cache()
            fitness_before = state["fitness"]
            indices = (pass_index, blocks.index(name))
            _search_block(evaluator, name, indices, settings, state, progress)
            if settings.reference_selection and validate is not None:
                _select_on_validation(evaluator, pass_index, validate(), state)
            progress.save(state)
            log.info(
                "search pass %d/%d %s: fitness %.6f -> %.6f",
                pass_index + 1,
                settings.passes,
                name,
                fitness_before,
                state["fitness"],
            )
        if state["best"] is not None:
            evaluator.write(state["best"]["scales"])
    return SearchResult(
        selected_on="calibration" if state["best"] is None else "validation",
        fitness_before=state["fitness_before"],
        fitness=state["fitness"],
        evaluations=state["evaluations"],
        accepted=state["accepted"],
        seconds=state["seconds"],
    )


def _select_on_validation(
    evaluator: Evaluator, pass_index: int, accuracy: float, state: dict[str, Any]
) -> None:
    """Store the current scales if the accuracy is the best so far, and always in the first pass.

    The reference code has the same rule.
    """
    if pass_index == 0 or accuracy > state["best"]["accuracy"]:
        scales = {name: vector.read() for name, vector in evaluator.vectors.items()}
        state["best"] = {"accuracy": accuracy, "scales": scales}


def _initial_state(evaluator: Evaluator, last_block: str, progress: Progress) -> dict[str, Any]:
    """The state of a search before the first block, with the fitness of the unchanged net."""
    start_time = time.perf_counter()
    fitness = evaluator.fitness(last_block)
    seconds = time.perf_counter() - start_time
    _check_fitness(fitness, "the unchanged model", "check the calibration images and ckpt")
    progress.rows.append((0, "", "incumbent", fitness, 1, f"{seconds:.3f}"))
    state: dict[str, Any] = {
        "visits": 0,  # number of finished block searches
        "evaluations": 0,
        "accepted": 0,
        "seconds": seconds,
        "fitness": fitness,
        "fitness_before": fitness,
        "scales": {},
        "best": None,
    }
    progress.save(state)
    return state


def _check_fitness(fitness: float, candidate: str, advice: str) -> None:
    if not math.isfinite(fitness):
        raise UsageError(
            f"search=evolution: the model's logits became NaN or infinite for {candidate}; {advice}"
        )


def _search_block(
    evaluator: Evaluator,
    name: str,
    indices: tuple[int, int],
    settings: SearchSettings,
    state: dict[str, Any],
    progress: Progress,
) -> None:
    """Search the scales of one block, and store the best scales in the net and in the state.

    Args:
        evaluator: computes the fitness of the net.
        name: name of the block.
        indices: (pass, block), each counted from 0.
        settings: settings of the search.
        state: state of the search, which is updated.
        progress: progress of the search, which gets a row for each candidate.
    """
    start_time = time.perf_counter()
    pass_index, _ = indices
    vector = evaluator.vectors[name]
    initial_scales = vector.read()
    radius = vector.radius(settings.radius)
    lowest_fitness = state["fitness"]

    def evaluate(cycle: int, scales: Tensor) -> float:
        nonlocal lowest_fitness
        evaluation_start = time.perf_counter()
        vector.write(scales)
        fitness = evaluator.fitness(name)
        candidate = f"candidate {cycle} of {name} in pass {pass_index}"
        _check_fitness(fitness, candidate, "use a smaller search.radius")
        is_accepted = fitness < lowest_fitness
        lowest_fitness = min(fitness, lowest_fitness)
        state["evaluations"] += 1
        state["accepted"] += is_accepted
        seconds = time.perf_counter() - evaluation_start
        progress.rows.append((pass_index, name, cycle, fitness, int(is_accepted), f"{seconds:.3f}"))
        return fitness

    def draw_cycle(cycle: int) -> Draw:
        return draw(
            settings.seed,
            (*indices, cycle),
            len(radius),
            radius,
            size=settings.population,
            tournament=settings.tournament,
        )

    best_scales = initial_scales
    best_fitness = lowest_fitness
    try:
        best_scales, best_fitness = evolve(
            initial_scales, lowest_fitness, evaluate, draw_cycle, settings
        )
    finally:
        # If a candidate fails, the block gets its old scales back.
        vector.write(best_scales)
    state["visits"] += 1
    state["fitness"] = best_fitness
    state["scales"][name] = vector.read()
    state["seconds"] += time.perf_counter() - start_time
