"""Bookkeeping of a steady-state evolutionary search over a vector of scales. Source: Evol-Q, arXiv 2308.10814, and its code.

Every step is a function of its arguments and every draw of (seed, pass, block, cycle), so a search that was stopped goes on from its
population alone. Vectors are float64 on the CPU, as in the reference: a mutation is smaller than what float32 keeps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

POPULATION = 15
TOURNAMENT = 10


class Population(NamedTuple):
    """Candidates, best first.

    Attributes:
        scales: (P, n) float64.
        losses: (P,) float64, ascending.
    """

    scales: Tensor
    losses: Tensor


class Draw(NamedTuple):
    """All that is random in one cycle.

    Attributes:
        members: (S,) int64, who takes part in the tournament, with replacement.
        noise: (n,) float64, uniform in [-radius, radius).
    """

    members: Tensor
    noise: Tensor


def noise_radius(bits: int) -> float:
    """Radius of the absolute noise for weights of `bits` bits: 1e-4 for 8, else 1e-3 (the reference's code; its paper has them swapped)."""
    return 1e-4 if bits == 8 else 1e-3


def draw(
    seed: int,
    place: tuple[int, int, int],
    length: int,
    radius: float | Tensor,
    *,
    size: int = POPULATION,
    tournament: int = TOURNAMENT,
) -> Draw:
    """The draws of one cycle.

    Args:
        seed: of the run.
        place: (pass, block, cycle), each from 0.
        length: n, entries of a candidate.
        radius: of the noise, one or (n,), in the unit of a scale, or a fraction for relative noise.
        size: P, members of the population.
        tournament: S, how many of them compete.
    """
    state = np.random.SeedSequence([n & 0xFFFFFFFF for n in (seed, *place)]).generate_state(
        1, np.uint64
    )[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    members = torch.randint(size, (tournament,), generator=generator)
    return Draw(
        members, (2 * torch.rand(length, generator=generator, dtype=torch.float64) - 1) * radius
    )


def initial_population(scales: Tensor, loss: float, size: int = POPULATION) -> Population:
    """`size` copies of the incumbent (n,) with its loss."""
    rows = scales.detach().cpu().double().reshape(1, -1).repeat(size, 1)
    return Population(rows, torch.full((size,), loss, dtype=torch.float64))


def best(population: Population) -> tuple[Tensor, float]:
    """Candidate (n,) with the lowest loss, the oldest of equals, and that loss."""
    index = int(population.losses.argmin())
    return population.scales[index], float(population.losses[index])


def select_parent(population: Population, members: Tensor) -> Tensor:
    """Candidate (n,) with the lowest loss among `members` (S,), the first of equals."""
    return population.scales[members[population.losses[members].argmin()]]


def mutate(parent: Tensor, noise: Tensor, *, relative: bool = False) -> Tensor:
    """|parent + noise|, or |parent (1 + noise)| for relative noise; (n,) each."""
    return (parent * (1 + noise) if relative else parent + noise).abs()


def evolved_child(population: Population, drawn: Draw, *, relative: bool = False) -> Tensor:
    """Candidate (n,) of an evolutionary search: a mutation of the tournament's winner."""
    return mutate(select_parent(population, drawn.members), drawn.noise, relative=relative)


def insert(population: Population, child: Tensor, loss: float) -> Population:
    """Append the child, sort by loss (stable: of equals, who came first stays ahead), drop the last.

    Args:
        population: P members.
        child: (n,).
        loss: its fitness, a finite number.
    """
    losses, order = torch.cat([population.losses, population.losses.new_tensor([loss])]).sort(
        stable=True
    )
    size = len(population.losses)
    return Population(
        torch.cat([population.scales, child.to(population.scales).reshape(1, -1)])[order[:size]],
        losses[:size],
    )
