"""Steady-state evolutionary search over a vector of scales.

Each step depends only on its arguments, and the random numbers of a cycle do not depend on earlier
cycles, so a resumed search finds the same scales as one without a stop. Vectors are float64 on the
CPU, as in the reference: float32 would round the small mutations.

Source: Evol-Q, arXiv 2308.10814, and its code.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

POPULATION = 15
TOURNAMENT = 10


class Population(NamedTuple):
    """Candidates of a search, best first.

    Attributes:
        scales: (P, n) float64.
        losses: (P,) float64, ascending.
    """

    scales: Tensor
    losses: Tensor


class Draw(NamedTuple):
    """Random numbers of one cycle.

    Attributes:
        members: (S,) int64, indices of the members that compete, drawn with replacement.
        noise: (n,) float64, uniform in [-radius, radius).
    """

    members: Tensor
    noise: Tensor


def noise_radius(bits: int) -> float:
    """Radius of the absolute noise: 1e-4 for 8-bit weights, else 1e-3.

    The values come from the reference code; the paper swaps them.
    """
    return 1e-4 if bits == 8 else 1e-3


def draw(
    seed: int,
    cycle_index: tuple[int, int, int],
    length: int,
    radius: float | Tensor,
    *,
    size: int = POPULATION,
    tournament: int = TOURNAMENT,
) -> Draw:
    """Draw the random numbers of one cycle.

    Args:
        seed: seed of the run.
        cycle_index: (pass, block, cycle) for which the numbers are drawn, each counted from 0.
        length: n, the number of entries of a candidate.
        radius: radius of the noise, a number or (n,), in the unit of a scale; for relative
            noise, a fraction of the scale.
        size: P, the number of members of the population.
        tournament: S, the number of members that compete.
    """
    entropy = [n & 0xFFFFFFFF for n in (seed, *cycle_index)]
    seed_value = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed_value >> np.uint64(1)))
    members = torch.randint(size, (tournament,), generator=generator)
    uniform = torch.rand(length, generator=generator, dtype=torch.float64)
    return Draw(members, (2 * uniform - 1) * radius)


def initial_population(scales: Tensor, loss: float, size: int = POPULATION) -> Population:
    """A population of `size` copies of the scales (n,), all with this loss."""
    rows = scales.detach().cpu().double().reshape(1, -1).repeat(size, 1)
    return Population(rows, torch.full((size,), loss, dtype=torch.float64))


def best_candidate(population: Population) -> tuple[Tensor, float]:
    """The candidate (n,) with the lowest loss, and this loss.

    If several candidates have this loss, return the oldest.
    """
    index = int(population.losses.argmin())
    return population.scales[index], float(population.losses[index])


def select_parent(population: Population, members: Tensor) -> Tensor:
    """The candidate (n,) with the lowest loss among `members` (S,).

    If several members have this loss, return the first in `members`.
    """
    winner = members[population.losses[members].argmin()]
    return population.scales[winner]


def mutate(parent: Tensor, noise: Tensor, *, relative: bool = False) -> Tensor:
    """Mutate scales (n,) to |parent + noise|, or with relative noise to |parent (1 + noise)|."""
    if relative:
        return (parent * (1 + noise)).abs()
    return (parent + noise).abs()


def evolve_child(population: Population, drawn: Draw, *, relative: bool = False) -> Tensor:
    """Candidate (n,) of an evolutionary search: the winner of a tournament, mutated."""
    parent = select_parent(population, drawn.members)
    return mutate(parent, drawn.noise, relative=relative)


def insert_child(population: Population, child: Tensor, loss: float) -> Population:
    """Insert a child, and drop the candidate with the highest loss.

    If several candidates have the highest loss, drop the newest of them.

    Args:
        population: P members.
        child: scales (n,) of the new candidate.
        loss: loss of the child, finite.
    """
    size = len(population.losses)
    losses = torch.cat([population.losses, population.losses.new_tensor([loss])])
    scales = torch.cat([population.scales, child.to(population.scales).reshape(1, -1)])
    losses, order = losses.sort(stable=True)
    return Population(scales[order[:size]], losses[:size])
