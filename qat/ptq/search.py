"""Evol-Q: search over the scales of a calibrated net, block by block, last block first. Paper: arXiv 2308.10814. See docs/evolq.md."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.blocks import find_blocks
from qat.model.scales import assert_ready
from qat.ptq.block_cache import GIB, trace, verified
from qat.ptq.distributed import Ranks
from qat.ptq.drivers import DRIVERS, Draws, Visit, seeded_draws
from qat.ptq.fitness import Evaluator, check_batches
from qat.ptq.search_settings import GRADIENT_METHODS, SearchSettings
from qat.ptq.state import SearchFiles, SearchState, fingerprint
from qat.ptq.vector import ScaleVector, joined, scale_vectors
from qat.utils.probing import probing

log = logging.getLogger(__name__)
Validate = Callable[[], float]
Line = tuple[Any, ...]


@dataclass(frozen=True)
class SearchResult:
    """What a search did.

    Attributes:
        method: see `SearchSettings`.
        selected_on: `calibration`, or `validation`: then accuracy on the validation images is no estimate for others.
        fitness_before: of the net as it came.
        fitness: of the scales that the search ended with; those kept on validation images are not measured again.
        evaluations: candidates.
        accepted: of them, how many became the incumbent.
        given_up: of them, how many lost a race.
        images: forwarded for candidates.
        seconds: all of it, runs before a resume too.
    """

    method: str
    selected_on: str
    fitness_before: float
    fitness: float
    evaluations: int
    accepted: int
    given_up: int
    images: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def search(
    net: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[Tensor],
    settings: SearchSettings,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    validate: Validate | None = None,
    options: SearchOptions | None = None,
) -> SearchResult:
    """Change the scales of a net for the better, in place; nothing else of it changes.

    Args:
        net: quantized, its scales filled; runs in eval mode, its mode is restored.
        batches: calibration images (N, C, H, W) each, as the net sees them; the same in every process.
        targets: float logits (N, classes) of each.
        settings: of the search.
        run_dir: folder of `search.csv` and `search.ckpt`; None = neither is written.
        resume: go on from `search.ckpt`, where there is one.
        validate: accuracy of the net as it is on validation images; asked after each visit under `reference_selection`.
        options: what only some callers need.

    Raises:
        UsageError: nothing to search, batches that do not fit, or a fitness that is not finite.
    """
    _check(batches, targets, settings, validate)
    assert_ready(net)
    with probing(net, ()):
        return _Search(net, batches, targets, settings, validate, options or SearchOptions()).run(run_dir, resume=resume)


@dataclass(frozen=True)
class SearchOptions:
    """What only some callers need.

    Attributes:
        group: processes that share the batches, of `torch.distributed`; each has the same net.
        draws: in the place of the seeded ones.
    """

    group: dist.ProcessGroup | None = None
    draws: Draws | None = None


def _check(batches: Sequence[Tensor], targets: Sequence[Tensor], settings: SearchSettings, validate: Validate | None) -> None:
    check_batches(batches, targets, settings.fitness)
    if settings.reference_selection and validate is None:
        raise UsageError("search.reference_selection=True: validation images are needed for it")


class _Search:
    def __init__(
        self,
        net: nn.Module,
        batches: Sequence[Tensor],
        targets: Sequence[Tensor],
        settings: SearchSettings,
        validate: Validate | None,
        options: SearchOptions,
    ) -> None:
        self.net, self.settings, self.validate = net, settings, validate
        self.ranks = Ranks(options.group)
        if self.ranks.world > len(batches):
            raise UsageError(
                f"search: {self.ranks.world} processes for {len(batches)} batches of calibration images; must be at most as many"
            )
        images = batches[0][: settings.micro_batch].to(next(net.parameters()).device)
        traced = trace(net, find_blocks(net), images[:1])
        by_block = scale_vectors(net, settings.targets, traced.order)
        # One backward has the gradients of all blocks: those methods visit all at once, with the forward passes of all.
        at_once = settings.method in GRADIENT_METHODS
        self.vectors: dict[str, ScaleVector] = joined(by_block) if at_once else by_block
        self.cycles = settings.cycles * (len(by_block) if at_once else 1)
        self.inputs = fingerprint([*net.state_dict().values(), *batches, *targets])
        sites = {name: [site.name for site in vector.sites] for name, vector in self.vectors.items()}
        share = sum(len(batch) for batch in batches[:: self.ranks.world])
        inner = traced.entering(sites, settings.cache_gib * GIB / share)
        self.evaluator = Evaluator(net, batches, targets, settings, verified(net, traced, images[:2], inner), self.ranks)
        self.draws = options.draws or seeded_draws(settings)
        self.numbers = {name: number for number, name in enumerate(find_blocks(net))}
        self.rows = torch.empty(0)

    def run(self, run_dir: str | Path | None, *, resume: bool) -> SearchResult:
        """All visits that are not done yet."""
        files = None if run_dir is None else SearchFiles(Path(run_dir), self.settings, self.inputs)
        with self.evaluator.active():
            state = self._start(files, resume=resume)
            plan = [(number, name) for number in range(self.settings.passes) for name in reversed(self.vectors)]
            for number, name in plan[state.visits :]:
                if name == plan[0][1]:
                    self.evaluator.new_pass()
                self._visit(state, number, name, files)
        if state.best is not None:
            self._restore(state.best["scales"])
        selected = "calibration" if state.best is None else "validation"
        counts = (state.evaluations, state.accepted, state.given_up, state.images, state.seconds)
        return SearchResult(self.settings.method, selected, state.first, state.fitness, *counts)

    def _start(self, files: SearchFiles | None, *, resume: bool) -> SearchState:
        """The state on the disk, else a new one: the net's own scales, measured."""
        state = files.read() if files is not None and resume else None
        if state is not None:
            self._restore(state.scales)
            log.info("search resumed after %d visits, fitness %.6f", state.visits, state.fitness)
        lines: list[Line] = []
        if state is None or self.settings.racing:
            # A race needs the incumbent's loss for every image, which is not in the file.
            began = time.perf_counter()
            found = self.evaluator.fitness(next(reversed(self.vectors)))
            self.rows, seconds = found.rows, time.perf_counter() - began
        if state is None:
            if not math.isfinite(found.fitness):
                raise UsageError(f"search: the fitness of the incumbent is {found.fitness} before any block is visited")
            state = SearchState(0, found.fitness, found.fitness, self._scales(), seconds=seconds)
            lines = [(0, "", "incumbent", found.fitness, 1, f"{seconds:.3f}", found.images)]
        if files is not None and self.ranks.writes:
            files.start_log(state.lines)
        self._save(state, lines, files)
        return state

    def _visit(self, state: SearchState, number: int, name: str, files: SearchFiles | None) -> None:
        began, before = time.perf_counter(), state.fitness
        vector, memory = self.vectors[name], state.memory.setdefault(name, {})
        place = (number, self.numbers[name])
        visit = Visit(name, place, self.cycles, vector, self.evaluator, vector.read(), state.fitness, self.rows, memory)
        start = visit.best
        try:
            DRIVERS[self.settings.method](visit, self.settings, self.draws)
        except BaseException:
            visit.put(start)
            raise
        visit.put(visit.best)
        self.rows = visit.rows
        self._validate(state, number)
        state.visits, state.fitness, state.scales[name] = state.visits + 1, visit.fitness, vector.read()
        state.accepted += sum(trial.accepted for trial in visit.trials)
        state.given_up += sum(trial.images < self.evaluator.n_images for trial in visit.trials)
        state.images += sum(trial.images for trial in visit.trials)
        state.evaluations += len(visit.trials)
        state.seconds += time.perf_counter() - began
        lines = [(number, name, t.cycle, t.fitness, int(t.accepted), f"{t.seconds:.3f}", t.images) for t in visit.trials]
        self._save(state, lines, files)
        log.info("search pass %d/%d %s: fitness %.6f -> %.6f", number + 1, self.settings.passes, name, before, visit.fitness)

    def _validate(self, state: SearchState, number: int) -> None:
        """The reference's rule: after the first pass the best accuracy stays, during it the latest."""
        if not self.settings.reference_selection or self.validate is None:
            return
        accuracy = self.validate()
        if state.best is None or number == 0 or accuracy > state.best["accuracy"]:
            state.best = {"accuracy": accuracy, "scales": self._scales()}

    def _save(self, state: SearchState, lines: Sequence[Line], files: SearchFiles | None) -> None:
        """First the lines, then the state that counts them: what a kill leaves in between is cut off again."""
        state.lines += len(lines)
        if files is None or not self.ranks.writes:
            return
        files.log(lines)
        files.write(state)

    def _scales(self) -> dict[str, Tensor]:
        return {name: vector.read() for name, vector in self.vectors.items()}

    def _restore(self, scales: dict[str, Tensor]) -> None:
        for name, vector in self.vectors.items():
            vector.write(scales[name])
            self.evaluator.changed(vector)
