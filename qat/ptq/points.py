"""Assignments of bits that were evaluated, and what a search over them found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat.functional.allocation import Assignment, average_bits, front


@dataclass
class BitsState:
    """All evaluations so far, in their order: whatever a search decides is a function of them and its settings.

    Attributes:
        assignments: (n, layers) uint8.
        fitness: (n,) float64.
        seconds: (n,) float64.
    """

    assignments: Tensor
    fitness: Tensor
    seconds: Tensor


@dataclass(frozen=True)
class Point:
    """One assignment.

    Attributes:
        bits: of each layer.
        size_bytes: of the net as stored.
        fitness: on calibration images.
    """

    bits: Assignment
    size_bytes: int
    fitness: float


@dataclass(frozen=True)
class BitsResult:
    """What a search found.

    Attributes:
        best: the lowest fitness within the budget; the net has these bits now.
        front: by ascending size; no assignment that was evaluated is as small as one of these and better, or smaller and as good.
        points: all that were evaluated, in their order.
        layers: names of the modules whose bits were searched.
        numels: entries of their weights.
        budget_bytes: of the net as stored.
        evaluations: made, before a resume too.
        seconds: taken by them.
    """

    best: Point
    front: tuple[Point, ...]
    points: tuple[Point, ...]
    layers: tuple[str, ...]
    numels: tuple[int, ...]
    budget_bytes: int
    evaluations: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data about the best one."""
        return {
            "method": "bits",
            "selected_on": "calibration",
            "fitness": self.best.fitness,
            "size_bytes": self.best.size_bytes,
            "budget_bytes": self.budget_bytes,
            "average_bits": average_bits(self.numels, self.best.bits),
            "bits": self.named(self.best),
            "front": len(self.front),
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }

    def named(self, point: Point) -> dict[str, int]:
        """Bits by module."""
        return dict(zip(self.layers, point.bits, strict=True))


@dataclass
class Record:
    """What is known of assignments.

    Attributes:
        points: all so far, in their order.
        seconds: that each took.
        earlier: fitness and seconds of those that a run which is resumed has evaluated.
    """

    points: dict[Assignment, Point] = field(default_factory=dict)
    seconds: dict[Assignment, float] = field(default_factory=dict)
    earlier: dict[Assignment, tuple[float, float]] = field(default_factory=dict)

    def add(self, point: Point, seconds: float) -> bool:
        """Take a point in; True if it is on the front now."""
        self.points[point.bits], self.seconds[point.bits] = point, seconds
        return not any(
            (p.size_bytes <= point.size_bytes and p.fitness <= point.fitness) for p in self.points.values() if p.bits != point.bits
        )

    def state(self) -> BitsState:
        """As it is stored."""
        known = list(self.points.values())
        return BitsState(
            torch.tensor([p.bits for p in known], dtype=torch.uint8),
            torch.tensor([p.fitness for p in known], dtype=torch.float64),
            torch.tensor(list(self.seconds.values()), dtype=torch.float64),
        )

    def within(self, budget: int) -> list[Point]:
        """All points of up to `budget` bytes, best first; of equals the smaller."""
        return sorted((p for p in self.points.values() if p.size_bytes <= budget), key=lambda p: (p.fitness, p.size_bytes))

    def front(self) -> list[Point]:
        """Those that no other one beats, by ascending size."""
        known = list(self.points.values())
        return [known[i] for i in front([p.size_bytes for p in known], [p.fitness for p in known])]
