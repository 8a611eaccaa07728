"""Fitness of assignments of bits: each is run from the first block in front of which nothing differs from an earlier one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from qat.functional.allocation import Assignment
from qat.ptq.block_cache import Trace
from qat.ptq.fitness import Evaluation, Evaluator
from qat.ptq.widths import Widths


class Replay:
    """Runs a net with one assignment after the other; which one came before changes the cost, not the fitness.

    Args:
        net: quantized, with blocks.
        evaluator: of the net, active.
        widths: of its weights.
        traced: how it runs, verified.

    Attributes:
        blocks: names, in the order in which they run.
        starts: per layer, number of the last block that begins before the layer runs; -1 = it runs in front of all of them.
        made: the assignment with which the inputs that are remembered were made.
    """

    def __init__(self, net: nn.Module, evaluator: Evaluator, widths: Widths, traced: Trace) -> None:
        self.net, self.evaluator, self.widths = net, evaluator, widths
        self.blocks = tuple(sorted(traced.prefixes, key=lambda name: traced.order[name]))
        begins = [traced.order[name] for name in self.blocks]
        self.starts = tuple(sum(begin < traced.order[site.name] for begin in begins) - 1 for site in widths.sites)
        self.made: Assignment | None = None

    def first_changed(self, one: Assignment, two: Assignment) -> int:
        """Number of the last block whose input is the same with both; -1 = that of none is."""
        differ = (start for start, a, b in zip(self.starts, one, two, strict=True) if a != b)
        return min(differ, default=len(self.blocks) - 1)

    def ordered(self, parent: Assignment, children: Iterable[Assignment]) -> list[Assignment]:
        """Children that change late blocks first: those that change what is in front of all blocks lead to inputs of their own."""
        return sorted(children, key=lambda child: -self.first_changed(parent, child))

    def prepare(self, parent: Assignment, children: Iterable[Assignment]) -> None:
        """Remember the inputs of blocks with the parent's bits, if that saves more blocks than it takes."""
        children, count = list(children), len(self.blocks)
        made = self.made
        as_it_is = sum(self._cost(child, made) for child in children)
        if made != parent and count + sum(self._cost(child, parent) for child in children) < as_it_is:
            self._put(parent)
            self._remember(parent)

    def fitness(self, assignment: Assignment) -> Evaluation:
        """Fitness of the net with these bits."""
        self._put(assignment)
        return self.evaluator.fitness(self._from(assignment))

    def _cost(self, child: Assignment, made: Assignment | None) -> int:
        """Blocks that run."""
        start = -1 if made is None else self.first_changed(made, child)
        return len(self.blocks) - max(start, 0)

    def _put(self, assignment: Assignment) -> None:
        self.evaluator.weights.forget(self.widths.write(assignment))

    def _from(self, assignment: Assignment) -> str:
        """The block to run from; where nothing that is remembered serves, all inputs are made anew, with this assignment."""
        reached = -1 if self.made is None else self.first_changed(self.made, assignment)
        held = [name for name in self.blocks[: reached + 1] if name in self.evaluator.prefixes.held]
        if held:
            return held[-1]
        self._remember(assignment)
        return self.blocks[-1]

    def _remember(self, assignment: Assignment) -> None:
        self.evaluator.new_pass()
        self.evaluator.prefixes.hold(self.blocks[-1])
        self.made = assignment
