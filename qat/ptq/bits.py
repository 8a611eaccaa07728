"""Search over the bits of weights under a size budget: which layers get few bits and which get many. See docs/evolq.md."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.allocation import (
    Assignment,
    assigned_bytes,
    brood,
    filled,
    greedy_path,
    lowered,
    mutated,
    rises,
    single_steps,
    spread,
)
from qat.functional.evolution import generator_at
from qat.functional.packing import packed_bytes
from qat.model.blocks import CONTAINER, find_blocks
from qat.model.convert import Conversion, conversion_of
from qat.model.scales import assert_ready
from qat.ptq.bits_settings import BitsSettings
from qat.ptq.block_cache import trace, verified
from qat.ptq.distributed import Ranks
from qat.ptq.fitness import Evaluator, check_batches
from qat.ptq.points import BitsResult, BitsState, Point, Record
from qat.ptq.replay import Replay
from qat.ptq.state import SearchFiles, fingerprint
from qat.ptq.widths import Widths, with_bits

log = logging.getLogger(__name__)
COLUMNS = ("generation", "size_bytes", "fitness", "accepted", "seconds", "bits")
MB = 1e6


@torch.no_grad()
def search_bits(
    net: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[Tensor],
    settings: BitsSettings,
    *,
    size_bytes: int,
    run_dir: str | Path | None = None,
    resume: bool = False,
    group: dist.ProcessGroup | None = None,
) -> BitsResult:
    """Choose the bits of the weights of a calibrated net, in place: bits, scales and zero points of weights change, and its recipe.

    Args:
        net: converted with a `PtqRecipe` and calibrated; runs in eval mode, its mode is restored.
        batches: calibration images (N, C, H, W) each, as the net sees them; the same in every process.
        targets: float logits (N, classes) of each.
        settings: of the search.
        size_bytes: of the net as it is, `qat.model.cost.size_bytes(net)`.
        run_dir: folder of `search.csv` and `search.ckpt`; None = neither is written.
        resume: go on from `search.ckpt`, where there is one.
        group: processes that share the batches, of `torch.distributed`; each has the same net.

    Raises:
        UsageError: nothing to search, a budget below the smallest size, batches that do not fit, or a fitness that is not finite.
    """
    _check(batches, targets, settings, Ranks(group))
    assert_ready(net)
    done = conversion_of(net)
    if done is None or not find_blocks(net):
        raise UsageError(f"search: needs a net that qat.convert has quantized and that has blocks, in modules called {CONTAINER!r}")
    modes = [(module, module.training) for module in net.modules()]
    try:
        return _BitSearch(net.eval(), batches, targets, settings, size_bytes, Ranks(group)).run(done, run_dir, resume=resume)
    finally:
        for module, mode in modes:
            module.training = mode


def _check(batches: Sequence[Tensor], targets: Sequence[Tensor], settings: BitsSettings, ranks: Ranks) -> None:
    check_batches(batches, targets, settings.fitness)
    if ranks.world > len(batches):
        raise UsageError(f"search: {ranks.world} processes for {len(batches)} batches of calibration images; must be at most as many")


class _BitSearch:
    def __init__(
        self,
        net: nn.Module,
        batches: Sequence[Tensor],
        targets: Sequence[Tensor],
        settings: BitsSettings,
        size_bytes: int,
        ranks: Ranks,
    ) -> None:
        self.net, self.settings, self.ranks = net, settings, ranks
        images = batches[0][: settings.micro_batch].to(next(net.parameters()).device)
        traced = trace(net, find_blocks(net), images[:1])
        self.widths = Widths(net, settings.targets, traced.order)
        self.choices, self.numels, self.start = settings.choices, self.widths.numels, self.widths.read()
        self.rest = size_bytes - assigned_bytes(self.numels, self.start)
        self.budget = self._budget()
        self.inputs = fingerprint([*net.state_dict().values(), *batches, *targets])
        traced = verified(net, traced, images[:2])
        self.evaluator = Evaluator(net, batches, targets, settings.engine(), traced, ranks)
        self.replay = Replay(net, self.evaluator, self.widths, traced)
        self.record = Record()
        self.files: SearchFiles | None = None

    def run(self, done: Conversion, run_dir: str | Path | None, *, resume: bool) -> BitsResult:
        self._open(run_dir, resume=resume)
        try:
            with self.evaluator.active():
                self._seeds()
                for generation in range(self.settings.generations):
                    self._generation(generation)
        except BaseException:
            self.widths.write(self.start)
            raise
        best, points = self.record.within(self.budget)[0], tuple(self.record.points.values())
        self.widths.write(best.bits)
        recipe = dataclasses.replace(done.recipe, overrides=with_bits(done.recipe, dict(zip(self.widths.names, best.bits, strict=True))))
        self.net.qat_conversion = dataclasses.replace(done, recipe=recipe)  # type: ignore[assignment]
        counts = (self.budget, len(points), math.fsum(self.record.seconds.values()))
        return BitsResult(best, tuple(self.record.front()), points, self.widths.names, self.numels, *counts)

    def _budget(self) -> int:
        """Bytes that the net may have.

        Raises:
            UsageError: with the lowest choice everywhere it has more.
        """
        name = self.settings.budget
        value = getattr(self.settings, name)
        searched = sum(math.ceil(n * value / 8) for n in self.numels)
        budget = round(value * MB) if name == "budget_mb" else self.rest + searched
        ends = (self.choices[0], self.choices[-1])
        smallest, largest = (self._size((bits,) * len(self.numels)) for bits in ends)
        if budget < smallest:
            lowest = ends[0] if name == "average_bits" else smallest / MB
            sizes = f"the net takes {smallest / MB} MB with {ends[0]} bits everywhere and {largest / MB} MB with {ends[1]}"
            raise UsageError(f"search.{name}={value}: {sizes}; must be a number of at least {lowest}")
        return budget

    def _size(self, bits: Assignment) -> int:
        return self.rest + assigned_bytes(self.numels, bits)

    def _open(self, run_dir: str | Path | None, *, resume: bool) -> None:
        """Find what an earlier run has evaluated."""
        if run_dir is None:
            return
        self.files = SearchFiles(Path(run_dir), self.settings, self.inputs, BitsState, COLUMNS)
        state = self.files.read() if resume else None
        if state is not None:
            values = zip(state.fitness.tolist(), state.seconds.tolist(), strict=True)
            self.record.earlier = dict(zip(map(tuple, state.assignments.tolist()), values, strict=True))
            log.info("search resumed after %d evaluations", len(self.record.earlier))
        if self.ranks.writes:
            self.files.start_log(len(self.record.earlier))

    def _seeds(self) -> None:
        """Equal bits everywhere, every single change of the highest of them, and the greedy ways from it down to the lowest."""
        uniform = [(bits,) * len(self.numels) for bits in self.choices]
        top = uniform[-1]
        own = [self.start] if set(self.start) <= set(self.choices) else []
        self._evaluate("uniform", top, [*uniform, *own])
        steps = self.replay.ordered(top, single_steps(top, self.choices))
        for _, some in itertools.groupby(steps, key=lambda child: self.replay.first_changed(top, child)):
            self._evaluate("sensitivity", top, list(some))
        losses = [[self._known((*top[:i], bits, *top[i + 1 :])) for bits in self.choices] for i in range(len(top))]
        table = rises(self._known(top), losses)
        path = greedy_path(self.numels, self.choices, table)
        fits = next(i for i, bits in enumerate(path) if self._size(bits) <= self.budget)
        # What a layer would gain by a byte decides who gets the bytes that are left.
        by_gain = sorted(range(len(top)), key=lambda i: (-table[i][0] / packed_bytes(self.numels[i], 8), i))
        full = filled(path[fits], self.numels, self.choices, self.budget - self.rest, by_gain)
        self._evaluate("greedy", top, [path[i] for i in spread(len(path), self.settings.population, fits)] + [full])
        self._tell("seeds")

    def _generation(self, generation: int) -> None:
        """Children of one of the best within the budget, made to fit it, or every other time of a point of the front, of any size."""
        generator = generator_at(self.settings.seed, generation)
        within = generation % 2 == 0
        parents = self.record.within(self.budget)[: self.settings.population] if within else self.record.front()
        # The better of two: those that lead are chosen more often.
        parent = parents[int(torch.randint(len(parents), (2 if within else 1,), generator=generator).min())].bits

        def child() -> Assignment:
            bits, order = mutated(parent, self.choices, self.settings.mutation, generator)
            limit, fills = self.budget - self.rest, bool(torch.randint(2, (1,), generator=generator))
            bits = lowered(bits, self.numels, self.choices, limit, order) if within else bits
            # Bytes that are left may be of use, or not: more bits are not always better.
            return filled(bits, self.numels, self.choices, limit, order) if within and fills else bits

        self._evaluate(generation, parent, brood(child, self.record.points.__contains__, self.settings.children))
        self._tell(f"generation {generation + 1}/{self.settings.generations}")

    def _evaluate(self, generation: int | str, parent: Assignment, assignments: Sequence[Assignment]) -> None:
        """Measure those that are not known yet; `parent` is what most of them resemble."""
        wanted = [bits for bits in dict.fromkeys(assignments) if bits not in self.record.points]
        new = [bits for bits in wanted if bits not in self.record.earlier]
        if new:
            self.replay.prepare(parent, new)
        lines = []
        for number, bits in enumerate(self.replay.ordered(parent, wanted)):
            fitness, seconds = self.record.earlier.get(bits) or self._measured(bits, number, generation)
            point = Point(bits, self._size(bits), fitness)
            accepted = self.record.add(point, seconds)
            if bits in new:
                lines.append((generation, point.size_bytes, fitness, int(accepted), f"{seconds:.3f}", " ".join(map(str, bits))))
        if self.files is not None and self.ranks.writes and lines:
            self.files.log(lines)
            self.files.write(self.record.state())

    def _measured(self, bits: Assignment, number: int, generation: int | str) -> tuple[float, float]:
        began = time.perf_counter()
        fitness = self.replay.fitness(bits).fitness
        if not math.isfinite(fitness):
            named = f"candidate {number} of generation {generation} (bits {' '.join(map(str, bits))})"
            raise UsageError(f"search: the fitness of {named} is {fitness}; its logits are not finite numbers")
        return fitness, time.perf_counter() - began

    def _known(self, bits: Assignment) -> float:
        return self.record.points[bits].fitness

    def _tell(self, when: str) -> None:
        best, count = self.record.within(self.budget)[0], len(self.record.points)
        log.info("search %s: %d evaluations, best fitness %.6f with %d bytes", when, count, best.fitness, best.size_bytes)
