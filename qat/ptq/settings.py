"""Settings of a search over scales. Source of the numbers: Evol-Q, arXiv 2308.10814, and its code; see docs/evolq.md."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qat.errors import UsageError
from qat.functional.evolution import POPULATION, TOURNAMENT
from qat.functional.infonce import FITNESSES, TEMPERATURE
from qat.spec import check_choice, check_globs, check_int, check_number

METHODS = ("evolution", "random", "adam", "sgd")
GRADIENT_METHODS = ("adam", "sgd")
# A step needs a forward, a backward, which counts as another, and a forward that measures what came out.
GRADIENT_STEP_CYCLES = 3
# The weights of attentions, whatever follows their name (LeViT: attn_downsample).
TARGETS = ("attn*.*.weight", "attn*.qk")


@dataclass(frozen=True)
class SearchSettings:
    """The knobs of `search/*.yaml`.

    Attributes:
        method: how new scales are found, one of `METHODS`.
        passes: over all blocks, last block first.
        cycles: forward passes over the calibration images per visit of a block, whatever the method.
        population: members of an evolution.
        tournament: how many of them compete to be a parent.
        radius: of the noise, step of the gradient methods; None = 1e-4 for 8 bits, else 1e-3.
        relative: `radius` is a fraction of each scale, not in its unit.
        fitness: `infonce`, `mse`, `kl` or `cosine` of quantized and float logits.
        temperature: of `infonce`.
        targets: globs of the scales to change, seen from the block: `attn.qkv.weight`, `attn.qk`, `mlp.fc1.weight`, `mlp.fc1.input`.
        racing: number of images after which a candidate may be given up because it is clearly worse; 0 = never.
        micro_batch: images that pass through the net at once.
        cache_gib: memory for the inputs of blocks, GiB; fewer blocks at a time are kept where all do not fit.
        seed: of all draws.
        reference_selection: keep what did best on validation images instead of calibration images, as the reference does.

    Raises:
        UsageError: a value that cannot work.
    """

    method: str = "evolution"
    passes: int = 10
    cycles: int = 3
    population: int = POPULATION
    tournament: int = TOURNAMENT
    radius: float | None = None
    relative: bool = False
    fitness: str = "infonce"
    temperature: float = TEMPERATURE
    targets: tuple[str, ...] = TARGETS
    racing: int = 0
    micro_batch: int = 10
    cache_gib: float = 4.0
    seed: int = 0
    reference_selection: bool = False

    def __post_init__(self) -> None:
        check_choice("search.method", self.method, METHODS)
        check_choice("search.fitness", self.fitness, FITNESSES)
        for name, lowest in (
            ("passes", 0),
            ("cycles", 1),
            ("population", 1),
            ("tournament", 1),
            ("racing", 0),
            ("micro_batch", 1),
            ("seed", 0),
        ):
            check_int(f"search.{name}", getattr(self, name), lowest)
        check_number("search.temperature", self.temperature, 0, above=True)
        check_number("search.cache_gib", self.cache_gib, 0)
        if self.radius is not None:
            check_number("search.radius", self.radius, 0, above=True)
        for name in ("relative", "reference_selection"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"search.{name}={getattr(self, name)!r}: must be true or false")
        self._check_targets()
        if self.method in GRADIENT_METHODS and self.cycles < GRADIENT_STEP_CYCLES:
            raise UsageError(f"search.cycles={self.cycles}: must be at least {GRADIENT_STEP_CYCLES} with search.method={self.method}")

    def _check_targets(self) -> None:
        object.__setattr__(self, "targets", check_globs("search.targets", self.targets, "attn.qkv.weight"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `SearchSettings(**d)` gives it back."""
        return dataclasses.asdict(self) | {"targets": list(self.targets)}
