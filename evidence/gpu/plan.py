"""Which runs on CIFAR-10 there are, and what is compared: all arms of a seed come before the next seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from qat.spec import PRESETS

# LSQ as its own best start has it, and the recipe seq.
WEIGHT_QUANTIZERS: dict[str, dict[str, Any]] = {
    "statsq": {},
    "lsq": {"weight_quantizer": "lsq", "step_init": "mse"},
    "seq": PRESETS["seq"],
}
SEEDS, QKR_SEEDS = 5, 8
BASE = "w2a2 statsq"
QKR, CGA = f"{BASE} qkr", f"{BASE} qkr cga"
PAIRS = (
    *((f"w2a{bits} {name}", f"w2a{bits} statsq") for bits in (2, 8) for name in WEIGHT_QUANTIZERS if name != "statsq"),
    (QKR, BASE),
    (CGA, QKR),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A net, its seed, and where it starts.

    Attributes:
        variant: its name in tables.
        seed: of order and augmentation; of a float net also that of its weights.
        knobs: of the recipe `ofq`; None = float.
        branch_of: the variant whose last epochs are annealed instead.
    """

    variant: str
    seed: int
    knobs: tuple[tuple[str, Any], ...] | None = None
    branch_of: str = ""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.variant} seed{self.seed}"

    @property
    def needs(self) -> str:
        """The run that has to be there before it, if any."""
        start = self.branch_of or ("float" if self.knobs is not None else "")
        return f"{start} seed{self.seed}" if start else ""


def quantized(variant: str, seed: int, **knobs: Any) -> Run:
    """A run at two bits, with standard attention unless `knobs` say otherwise."""
    return Run(variant, seed, tuple({"bits": 2, "attention": "standard", **knobs}.items()))


def _of_seed(seed: int) -> Iterator[Run]:
    """Runs at W2 A2."""
    yield Run("float", seed)
    for name in WEIGHT_QUANTIZERS:
        yield quantized(f"w2a2 {name}", seed, **WEIGHT_QUANTIZERS[name])
    yield quantized(QKR, seed, attention="qkr")
    annealed = quantized(CGA, seed, attention="qkr")
    yield Run(CGA, seed, annealed.knobs, branch_of=QKR)


def runs(*, dry_run: bool) -> list[Run]:
    """All of them, in order."""
    seeds, qkr_seeds, of_a8 = (1, 1, ["statsq"]) if dry_run else (SEEDS, QKR_SEEDS, [*WEIGHT_QUANTIZERS])
    found = [run for seed in range(seeds) for run in _of_seed(seed)]
    found += [quantized(f"w2a8 {name}", seed, **WEIGHT_QUANTIZERS[name], act_bits=8) for seed in range(seeds) for name in of_a8]
    return found + [run for seed in range(seeds, qkr_seeds) for run in _of_seed(seed) if run.variant in {"float", BASE, QKR}]
