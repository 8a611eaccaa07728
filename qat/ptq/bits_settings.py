"""The knobs of a search over the bits of weights; docs/evolq.md."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qat.errors import UsageError
from qat.functional.infonce import FITNESSES, TEMPERATURE
from qat.ptq.settings import SearchSettings
from qat.spec import check_bits, check_choice, check_globs, check_int, check_number

METHOD = "bits"
CHOICES = (2, 3, 4, 6, 8)
BUDGETS = ("budget_mb", "average_bits")


@dataclass(frozen=True)
class BitsSettings:
    """The knobs of `search/bits.yaml`.

    Attributes:
        method: `bits`.
        budget_mb: of the net as stored (`qat.cost.size_bytes`), in 10^6 bytes; this or `average_bits` is given.
        average_bits: mean width of the weights that are searched.
        choices: widths that a weight may get.
        targets: globs of the modules whose weights are searched, by their names in the net: `blocks.*.mlp.*`.
        generations: of the evolution.
        children: evaluated in each generation.
        population: best assignments within the budget from which parents are drawn.
        mutation: layers that change in a child, at most.
        front_points: how many points of the front are evaluated on the evaluation split at the end; 0 = none.
        fitness: `infonce`, `mse`, `kl` or `cosine` of quantized and float logits.
        temperature: of `infonce`.
        micro_batch: images that pass through the net at once.
        cache_gib: memory for the inputs of blocks, GiB.
        seed: of all draws.

    Raises:
        UsageError: a value that cannot work.
    """

    method: str = METHOD
    budget_mb: float | None = None
    average_bits: float | None = None
    choices: tuple[int, ...] = CHOICES
    targets: tuple[str, ...] = ("*",)
    generations: int = 30
    children: int = 4
    population: int = 8
    mutation: int = 3
    front_points: int = 8
    fitness: str = "infonce"
    temperature: float = TEMPERATURE
    micro_batch: int = 10
    cache_gib: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("search.method", self.method, (METHOD,))
        check_choice("search.fitness", self.fitness, FITNESSES)
        for name, lowest in (
            ("generations", 0),
            ("children", 1),
            ("population", 1),
            ("mutation", 1),
            ("front_points", 0),
            ("micro_batch", 1),
            ("seed", 0),
        ):
            check_int(f"search.{name}", getattr(self, name), lowest)
        check_number("search.temperature", self.temperature, 0, above=True)
        check_number("search.cache_gib", self.cache_gib, 0)
        self._check_budget()
        self._check_choices()
        object.__setattr__(self, "targets", check_globs("search.targets", self.targets, "blocks.*.mlp.*"))

    def _check_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            stated = ", ".join(f"search.{name}={getattr(self, name)!r}" for name in BUDGETS)
            raise UsageError(f"{stated}: one of them is needed, and only one: the size that the net may have")
        check_number(f"search.{given[0]}", getattr(self, given[0]), 0, above=True)

    def _check_choices(self) -> None:
        if not isinstance(self.choices, list | tuple) or len(set(self.choices)) < 2:
            raise UsageError(f"search.choices={self.choices!r}: must be a list of at least two widths")
        for bits in self.choices:
            check_bits("search.choices", bits)
        object.__setattr__(self, "choices", tuple(sorted(set(self.choices))))
        if self.average_bits is not None:
            check_number("search.average_bits", self.average_bits, self.choices[0])

    @property
    def budget(self) -> str:
        """The setting that says how large the net may be."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    def engine(self) -> SearchSettings:
        """What the evaluation of a net has to know."""
        shared = {name: getattr(self, name) for name in ("fitness", "temperature", "micro_batch", "cache_gib", "seed")}
        return SearchSettings(**shared)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `BitsSettings(**d)` gives it back."""
        return dataclasses.asdict(self) | {"choices": list(self.choices), "targets": list(self.targets)}
