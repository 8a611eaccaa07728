"""How a visit looks for better scales. Every driver spends the visit's cycles, forward passes over the calibration images.

`evolution` and `random` visit one block after the other. A gradient driver's visit is of all blocks at once, with the cycles of all: one
backward has the gradients of all their scales. It counts as a forward: it goes through the same blocks, and of the weights' gradients
only those of the targets are made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.evolution import Draw, draw, evolved_child, initial_population, insert, random_child
from qat.ptq.fitness import Evaluation, Evaluator
from qat.ptq.search_settings import SearchSettings
from qat.ptq.vector import ScaleVector

# (pass, block, cycle), each from 0, and the radius of each scale (n,), to what is random in that cycle.
Draws = Callable[[tuple[int, int, int], Tensor], Draw]
Memory = dict[str, Tensor]
_BETAS, _EPS, _MOMENTUM = (0.9, 0.999), 1e-8, 0.9


def seeded_draws(settings: SearchSettings) -> Draws:
    """Draws that depend on the seed and the place alone."""

    def drawn(place: tuple[int, int, int], radius: Tensor) -> Draw:
        unit = draw(settings.seed, place, len(radius), 1.0, size=settings.population, tournament=settings.tournament)
        return unit._replace(noise=unit.noise * radius)

    return drawn


@dataclass(frozen=True)
class Trial:
    """One evaluation: a line of `search.csv`."""

    cycle: int
    fitness: float
    accepted: bool
    images: int
    seconds: float


@dataclass
class Visit:
    """A block, or several, while the scales are searched. The best of what was evaluated is what it leaves behind.

    Attributes:
        name: of the block, the first of several.
        place: (pass, block), each from 0, blocks counted from the first.
        cycles: forward passes over the calibration images to be spent.
        vector: its scales.
        evaluator: of the net.
        best: scales (n,) with the lowest fitness so far, at first those of the net.
        fitness: theirs.
        rows: theirs, by image; see `Evaluation.rows`.
        memory: what a driver wants to find again at the next visit.
        trials: all evaluations so far.
    """

    name: str
    place: tuple[int, int]
    cycles: int
    vector: ScaleVector
    evaluator: Evaluator
    best: Tensor
    fitness: float
    rows: Tensor
    memory: Memory
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start_rows = self.rows

    def evaluate(self, scales: Tensor, cycle: int) -> float:
        """Fitness of scales (n,); inf for a candidate that lost the race.

        Raises:
            UsageError: it is not a finite number.
        """
        began = time.perf_counter()
        self.put(scales)
        # Against what the visit began with: a child that is worse than that is no member of any population.
        found = self.evaluator.fitness(self.name, self.start_rows)
        self._take(scales, cycle, found, began)
        return found.fitness

    def gradient(self, scales: Tensor, cycle: int | None) -> Tensor:
        """Gradient (n,) of the fitness at scales (n,), which counts as an evaluation of them unless `cycle` is None.

        Raises:
            UsageError: the fitness is not a finite number.
        """
        began = time.perf_counter()
        self.put(scales)
        found, gradient = self.evaluator.gradient(self.name, self.vector)
        if cycle is not None:
            self._take(scales, cycle, found, began)
        return gradient

    def _take(self, scales: Tensor, cycle: int, found: Evaluation, began: float) -> None:
        given_up = found.images < self.evaluator.n_images
        if not (given_up or math.isfinite(found.fitness)):
            where = f"candidate {cycle} of block {self.name} in pass {self.place[0]}"
            raise UsageError(f"search: the fitness of {where} is {found.fitness}; its logits are not finite numbers")
        accepted = found.fitness < self.fitness
        if accepted:
            self.best, self.fitness, self.rows = scales, found.fitness, found.rows
        self.trials.append(Trial(cycle, found.fitness, accepted, found.images, time.perf_counter() - began))

    def put(self, scales: Tensor) -> None:
        """Write scales (n,) into the net."""
        self.vector.write(scales)
        self.evaluator.changed(self.vector)

    def radius(self, settings: SearchSettings) -> Tensor:
        """(n,) float64, in the unit of each scale or as a fraction of it."""
        return self.vector.radius(settings.radius)


class Driver(Protocol):
    """Tries scales at a visit; the visit remembers the best."""

    def __call__(self, visit: Visit, settings: SearchSettings, draws: Draws) -> None:
        """Spend `visit.cycles` forward passes."""


def evolution(visit: Visit, settings: SearchSettings, draws: Draws) -> None:
    """Steady state: the tournament's winner mutates, the worst of all leaves. Source: Evol-Q's code."""
    population = initial_population(visit.best, visit.fitness, settings.population)
    radius = visit.radius(settings)
    for cycle in range(visit.cycles):
        child = evolved_child(population, draws((*visit.place, cycle), radius), relative=settings.relative)
        population = insert(population, child, visit.evaluate(child, cycle)).population


def random(visit: Visit, settings: SearchSettings, draws: Draws) -> None:
    """All candidates are mutations of the scales that the visit began with."""
    start, radius = visit.best, visit.radius(settings)
    for cycle in range(visit.cycles):
        visit.evaluate(random_child(start, draws((*visit.place, cycle), radius), relative=settings.relative), cycle)


def adam(visit: Visit, settings: SearchSettings, draws: Draws) -> None:
    """Adam (arXiv 1412.6980) with the radius as learning rate; its moments last from visit to visit."""
    _descend(visit, settings, _adam_direction)


def sgd(visit: Visit, settings: SearchSettings, draws: Draws) -> None:
    """Gradient descent with momentum 0.9; the entry that moves farthest moves by the radius."""
    _descend(visit, settings, _sgd_direction)


def _adam_direction(gradient: Tensor, memory: Memory) -> Tensor:
    zeros = torch.zeros_like(gradient)
    first = _BETAS[0] * memory.get("first", zeros) + (1 - _BETAS[0]) * gradient
    second = _BETAS[1] * memory.get("second", zeros) + (1 - _BETAS[1]) * gradient.square()
    steps = memory.get("steps", torch.zeros(())) + 1
    memory |= {"first": first, "second": second, "steps": steps}
    corrections = [1 - beta ** int(steps) for beta in _BETAS]
    return first / corrections[0] / ((second / corrections[1]).sqrt() + _EPS)


def _sgd_direction(gradient: Tensor, memory: Memory) -> Tensor:
    momentum = _MOMENTUM * memory.get("momentum", torch.zeros_like(gradient)) + gradient
    memory["momentum"] = momentum
    return momentum / momentum.abs().max().clamp(min=torch.finfo(momentum.dtype).tiny)


def _descend(visit: Visit, settings: SearchSettings, direction_of: Callable[[Tensor, Memory], Tensor]) -> None:
    """Steps are never taken back: each goes on from where the last one led, in the next visit too, and the best is remembered.

    A gradient is a forward and a backward; its forward says where the step before has led, and one more forward says it of the last.
    A relative radius makes it a descent in the logarithm of the scales.
    """
    radius = visit.radius(settings)
    here, cycle = visit.memory.get("here", visit.best), None
    for step in range((visit.cycles - 1) // 2):
        factor = here if settings.relative else torch.ones_like(here)
        gradient = visit.gradient(here, cycle) * factor
        here = (here - direction_of(gradient, visit.memory) * radius * factor).abs()
        cycle = step
    if cycle is not None:
        visit.evaluate(here, cycle)
    visit.memory["here"] = here


DRIVERS: Mapping[str, Driver] = MappingProxyType({"evolution": evolution, "random": random, "adam": adam, "sgd": sgd})
