"""What a search minimises: how far the quantized logits of the calibration images are from the float ones."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import UsageError
from qat.functional.infonce import logit_fitness
from qat.ptq.block_cache import GIB, PrefixCache, Trace
from qat.ptq.distributed import Ranks
from qat.ptq.search_settings import SearchSettings
from qat.ptq.vector import ScaleVector
from qat.ptq.weight_cache import WeightCache

# A candidate is given up when it is worse by this many standard errors of what the images to come may change.
# Of candidates given up so, 1.8 % would have been accepted (2.8 % with 100 images): docs/evolq.md.
CLEARLY = 2.0
RowLosses = Callable[[Tensor, Tensor, int], Tensor]


@torch.no_grad()
def logits_of(net: nn.Module, images: Tensor, micro_batch: int) -> Tensor:
    """(N, classes) of images (N, C, H, W), some at a time, joined; a batch of 100 at once would fall out of the processor's caches.

    Raises:
        UsageError: the net gives something else, as a backbone does.
    """
    device = next(net.parameters()).device
    parts = [net(part.to(device)) for part in images.split(micro_batch)]
    if not isinstance(parts[0], Tensor) or parts[0].ndim != 2:
        raise UsageError("search: this net gives no logits (N, classes), which the fitness is made of; calibrate takes nets of any output")
    return torch.cat(parts)


def plain_fitness(net: nn.Module, batches: Sequence[Tensor], targets: Sequence[Tensor], settings: SearchSettings) -> float:
    """Fitness of a net by whole forwards and nothing remembered: what `Evaluator.fitness` gives, to the last bit.

    Args:
        net: quantized, in eval mode.
        batches: images (N, C, H, W) each.
        targets: float logits (N, classes) each.
        settings: of the search.
    """
    loss = logit_fitness(settings.fitness, settings.temperature)
    losses = [loss(logits_of(net, images, settings.micro_batch), t) for images, t in zip(batches, targets, strict=True)]
    return float(torch.stack(losses).double().mean())


def check_batches(batches: Sequence[Tensor], targets: Sequence[Tensor], fitness: str) -> None:
    """Raise `UsageError` unless each batch of images has its logits, and images for a fitness that compares them with each other."""
    if not batches or [len(b) for b in batches] != [len(t) for t in targets]:
        raise UsageError(
            f"search: {len(batches)} batches of images and {len(targets)} of logits; must be as many, of equal lengths, at least one"
        )
    if fitness == "infonce" and min(map(len, batches)) < 2:
        raise UsageError("search.fitness='infonce': a batch of one image has no others; must be ptq.batch of at least 2, or mse")


def row_losses(kind: str, temperature: float) -> RowLosses:
    """A function (q, k, start) -> (n,): the terms of a fitness for rows of a batch; their mean over all its rows is the fitness.

    q (n, D) are the quantized logits of rows start to start + n, k (N, D) the float logits of the whole batch.

    Args:
        kind: see `logit_fitness`.
        temperature: of `infonce`.
    """

    def infonce(q: Tensor, k: Tensor, start: int) -> Tensor:
        cosines = F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).T
        own = torch.arange(start, start + len(q), device=q.device)
        return 2 * temperature * F.cross_entropy(cosines / temperature, own, reduction="none")

    def mse(q: Tensor, k: Tensor, start: int) -> Tensor:
        return (q.float() - k[start : start + len(q)].float()).square().mean(-1)

    def kl(q: Tensor, k: Tensor, start: int) -> Tensor:
        rows = k[start : start + len(q)].float().log_softmax(-1)
        return F.kl_div(q.float().log_softmax(-1), rows, reduction="none", log_target=True).sum(-1)

    def cosine(q: Tensor, k: Tensor, start: int) -> Tensor:
        return 1 - F.cosine_similarity(q.float(), k[start : start + len(q)].float(), dim=-1)

    return {"infonce": infonce, "mse": mse, "kl": kl, "cosine": cosine}[kind]


@dataclass(frozen=True)
class Evaluation:
    """One look at all calibration images, or at some of them.

    Attributes:
        fitness: mean over the batches; inf for a candidate that was given up.
        images: how many were run, over all processes.
        rows: loss of every image that this process ran, in their order; empty unless racing.
    """

    fitness: float
    images: int
    rows: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Images that pass through the net at once.

    Attributes:
        index: place among those of this process.
        images: (n, C, H, W), on the net's device.
        batch: number of the batch that they are a part of.
        start: of the first of them in it.
        last: they end their batch.
    """

    index: int
    images: Tensor
    batch: int
    start: int
    last: bool


@dataclass
class Race:
    """Is a candidate clearly worse than the incumbent, by the images seen so far?

    Attributes:
        incumbent: loss of every image of this process, in the order in which they are run.
        after: images to see before the first answer.
        total: images that all processes have.
        ranks: the processes whose images count together.
        images: seen so far by all of them.
    """

    incumbent: Tensor
    after: int
    total: int
    ranks: Ranks
    images: int = 0

    def lost(self, rows: Tensor) -> bool:
        """Judge by the candidate's losses so far (n,), n up to all images; all processes get the same answer.

        What counts is the mean over all images, not over all that could ever be: the standard error of its estimate shrinks to zero
        with the images that are left (sampling without replacement, factor 1 - n / total).
        """
        worse = rows - self.incumbent[: len(rows)]
        sums = torch.stack([worse.new_tensor(len(worse)), worse.sum(), worse.square().sum()])
        n, summed, squares = self.ranks.total(sums).tolist()
        self.images = int(n)
        if n < max(self.after, 2) or n >= self.total:
            return False
        mean = summed / n
        variance = max(squares / n - mean * mean, 0.0) * n / (n - 1)
        return bool(mean > CLEARLY * math.sqrt(variance * (1 / n - 1 / self.total)))


class _Tally:
    """Losses of one evaluation while its micro-batches come in."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.losses = torch.zeros(evaluator.n_batches, dtype=torch.float64)
        self.rows: list[Tensor] = []
        self.joined: list[Tensor] = []

    def take(self, micro: MicroBatch | None, *, rows: bool) -> None:
        """Run a micro-batch; None = this process has no more."""
        if micro is None:
            return
        logits = self.evaluator.forward(micro)
        target = self.evaluator.targets[micro.batch]
        self.add(micro, logits, self.evaluator.row_losses(logits, target, micro.start) if rows else None)

    def add(self, micro: MicroBatch, logits: Tensor, rows: Tensor | None) -> None:
        """Count the logits (n, classes) of a micro-batch, and the losses of its images (n,) if wanted."""
        self.joined.append(logits)
        if rows is not None:
            self.rows.append(rows.double().cpu())
        if micro.last:
            self.losses[micro.batch] = self.evaluator.loss(torch.cat(self.joined), self.evaluator.targets[micro.batch]).double()
            self.joined.clear()

    def all_rows(self) -> Tensor:
        """(n,) float64."""
        return torch.cat(self.rows) if self.rows else torch.empty(0, dtype=torch.float64)


class Evaluator:
    """Fitness of a net whose scales change block by block.

    Args:
        net: quantized, in eval mode.
        batches: calibration images (N, C, H, W) each, all of them in every process.
        targets: their float logits (N, classes).
        settings: of the search.
        traced: how the net runs.
        ranks: processes that share the batches.
    """

    def __init__(
        self, net: nn.Module, batches: Sequence[Tensor], targets: Sequence[Tensor], settings: SearchSettings, traced: Trace, ranks: Ranks
    ) -> None:
        device = next(net.parameters()).device
        size = settings.micro_batch
        self.net, self.settings, self.ranks = net, settings, ranks
        self.n_batches, self.n_images = len(batches), sum(len(images) for images in batches)
        self.targets = {j: targets[j].to(device) for j in ranks.own(len(batches))}
        parts = [(j, start) for j in self.targets for start in range(0, len(batches[j]), size)]
        self.micro_batches = [
            MicroBatch(n, batches[j][i : i + size].to(device), j, i, i + size >= len(batches[j])) for n, (j, i) in enumerate(parts)
        ]
        self.rounds = max(sum(-(-len(batches[j]) // size) for j in range(r, len(batches), ranks.world)) for r in range(ranks.world))
        self.loss = logit_fitness(settings.fitness, settings.temperature)
        self.row_losses = row_losses(settings.fitness, settings.temperature)
        self.weights = WeightCache(net)
        self.prefixes = PrefixCache(net, traced, [m.images for m in self.micro_batches], settings.cache_gib * GIB)

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        """While it lasts, weights are quantized once; whoever changes a scale calls `changed`."""
        try:
            with self.weights.active():
                yield
        finally:
            self.prefixes.clear()

    def changed(self, vector: ScaleVector) -> None:
        """The scales of these sites are others now. What is in front of their block is as it was: see `new_pass`."""
        self.weights.forget(vector.sites)

    def new_pass(self) -> None:
        """Blocks are visited from the last one on again: their inputs are not what they were."""
        self.prefixes.clear()

    def forward(self, micro: MicroBatch) -> Tensor:
        """Logits (n, classes), from the block on that is replayed."""
        self.prefixes.at = micro.index
        logits: Tensor = self.net(micro.images)
        return logits

    def fitness(self, block: str, incumbent: Tensor | None = None) -> Evaluation:
        """Fitness with the scales that the net has now.

        Args:
            block: no scale in front of it has changed since `new_pass`.
            incumbent: loss of every image of this process with the scales to beat, (n,) float64; None = no race.
        """
        race = Race(incumbent, self.settings.racing, self.n_images, self.ranks) if incumbent is not None and self.settings.racing else None
        tally = _Tally(self)
        with torch.no_grad(), self.prefixes.replaying(block):
            for _, micro in zip(range(self.rounds), itertools.chain(self.micro_batches, itertools.repeat(None)), strict=False):
                tally.take(micro, rows=self.settings.racing > 0)
                if race is not None and race.lost(tally.all_rows()):
                    return Evaluation(math.inf, race.images, torch.empty(0))
        return Evaluation(float(self.ranks.total(tally.losses).mean()), self.n_images, tally.all_rows())

    def gradient(self, block: str, vector: ScaleVector) -> tuple[Evaluation, Tensor]:
        """Fitness, and its gradient (n,) float64 for the scales of a block, straight through the roundings; one forward, one backward."""
        scales, slopes = zip(*vector.leaves(), strict=True)
        asked = [scale.requires_grad for scale in scales]
        total = torch.zeros(sum(s.numel() for s in scales), dtype=torch.float64)
        tally = _Tally(self)
        with torch.enable_grad(), self.prefixes.replaying(block), self.weights.live(vector.sites):
            try:
                for scale in scales:
                    scale.requires_grad_()
                for micro in self.micro_batches:
                    total += self._gradient(micro, scales, tally)
            finally:
                for scale, was in zip(scales, asked, strict=True):
                    scale.requires_grad_(was)
        found = Evaluation(float(self.ranks.total(tally.losses).mean()), self.n_images, tally.all_rows())
        return found, self.ranks.total(total) / torch.cat([slope.cpu().double().flatten() for slope in slopes])

    def _gradient(self, micro: MicroBatch, scales: Sequence[Tensor], tally: _Tally) -> Tensor:
        target = self.targets[micro.batch]
        logits = self.forward(micro)
        rows = self.row_losses(logits, target, micro.start)
        grads = torch.autograd.grad(rows.sum() / (len(target) * self.n_batches), scales, materialize_grads=True)
        tally.add(micro, logits.detach(), rows.detach() if self.settings.racing else None)
        return torch.cat([grad.cpu().double().flatten() for grad in grads])
