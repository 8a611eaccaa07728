"""Which weights get how many bits under a size: chosen by measured losses that are taken to add up, written as a setting of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qat.analysis.sensitivity.parts import Part, TakenApart
from qat.errors import UsageError
from qat.functional.knapsack import least_loss
from qat.functional.packing import packed_bytes
from qat.model.cost import FLOAT_BYTES, size_bytes
from qat.model.sites import iter_quantizers
from qat.quantizers import Quantizer
from qat.spec import QuantRecipe
from qat.utils.validate import FLOAT_BITS

MB = 10**6
# Of a float net whose weights `ptq.py` quantizes: a scale and a zero point for each row.
_NEW_SCALE_BYTES = 2 * FLOAT_BYTES
# What a rule about `bits` sets too; one that is older would win over it.
_FOLLOW_BITS = ("stem_bits", "head_bits")


@dataclass(frozen=True)
class Mix:
    """Bits of each part.

    Attributes:
        bits: of the weights of each part whose bits are free.
        size_bytes: of the net as stored.
        rise: sum of the losses that each of them was measured to add, as if they did not depend on each other.
    """

    bits: Mapping[str, int]
    size_bytes: int
    rise: float


class NetSizes:
    """What a net takes, and may be chosen.

    Args:
        apart: the net.
        widths: that are tried; the present one of a part is a choice too.

    Attributes:
        parts: those whose bits are free.
        rest: bytes of all else.
    """

    def __init__(self, apart: TakenApart, widths: Sequence[int]) -> None:
        self.parts = [part for part in apart.parts if not part.fixed]
        self.widths = {part.name: sorted({*widths, *([part.bits] if part.bits is not None else [])} - {FLOAT_BITS}) for part in self.parts}
        quantizers = {weight.quantizer for part in self.parts for weight in part.weights}
        present = sum(packed_bytes(weight.numel, weight.grid.bits) for part in self.parts for weight in part.weights)
        self.rest = size_bytes(apart.net) - present + (_scale_bytes(apart, quantizers) if apart.recipe is None else 0)

    def of(self, part: Part, bits: int) -> int:
        """Bytes of the weights of a part."""
        return sum(packed_bytes(weight.numel, bits) for weight in part.weights)

    def total(self, bits: Mapping[str, int]) -> int:
        """Bytes of the net with the bits of each part."""
        return self.rest + sum(self.of(part, bits[part.name]) for part in self.parts)

    def bounds(self) -> tuple[int, int]:
        """Bytes of the smallest and of the largest choice."""
        least = {part.name: self.widths[part.name][0] for part in self.parts}
        most = {part.name: self.widths[part.name][-1] for part in self.parts}
        return self.total(least), self.total(most)

    def check(self, label: str, budget_mb: float) -> None:
        """Raise `UsageError` if nothing is free to be chosen, or the smallest choice is above a budget."""
        if not self.parts:
            raise UsageError(f"analysis.budget_mb={budget_mb}: {label} has no weights whose bits can be chosen; must be null")
        least, most = self.bounds()
        if least > round(budget_mb * MB):
            # To the byte: what is printed can be typed.
            lowest = f"{least / MB:f} MB with the lowest bits everywhere, {most / MB:f} with the highest"
            raise UsageError(f"analysis.budget_mb={budget_mb}: below the smallest possible size of {label}: {lowest}")

    def uniform(self, width: int) -> Mix:
        """The same bits for all."""
        bits = {part.name: width for part in self.parts}
        return Mix(bits, self.total(bits), 0.0)

    def best(self, budget_mb: float, rises: Mapping[tuple[str, int], float]) -> Mix:
        """The least sum of rises that fits a budget; of equal ones the smaller.

        Args:
            budget_mb: of the net as stored, 10^6 bytes.
            rises: what each part's bits add to the loss.
        """
        groups = [[(self.of(part, bits), rises[part.name, bits]) for bits in self.widths[part.name]] for part in self.parts]
        chosen = least_loss(groups, round(budget_mb * MB) - self.rest)
        bits = {part.name: self.widths[part.name][i] for part, i in zip(self.parts, chosen, strict=True)}
        return Mix(bits, self.total(bits), sum(rises[name, width] for name, width in bits.items()))


def _scale_bytes(apart: TakenApart, quantizers: set[Quantizer]) -> int:
    return sum(site.latent().shape[0] * _NEW_SCALE_BYTES for site in iter_quantizers(apart.net) if site.quantizer in quantizers)


def as_setting(apart: TakenApart, bits: Mapping[str, int]) -> str:
    """The bits as a command takes them: `quant.overrides={...}` for `train.py`, `ptq.overrides={...}` for `ptq.py`.

    Args:
        apart: the net.
        bits: by part.
    """
    widths = {weight.name: bits[part.name] for part in apart.parts if part.name in bits for weight in part.weights}
    group = "ptq" if apart.recipe is None else apart.recipe.GROUP
    rules: Mapping[str, Mapping[str, Any]] = {name: {"bits": width} for name, width in widths.items()}
    if apart.recipe is not None:
        rules = with_bits(apart.recipe, widths)
    written = (f"{name}:{{{','.join(f'{knob}:{_written(value)}' for knob, value in rule.items())}}}" for name, rule in rules.items())
    return f"{group}.overrides={{{','.join(written)}}}"


def _written(value: object) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value) if isinstance(value, int | float) or str(value).isidentifier() else f'"{value}"'


def with_bits(recipe: QuantRecipe, bits: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The `overrides` of a recipe with those bits: its own rules, then one for each module.

    Args:
        recipe: of the net as it was converted.
        bits: of weights, by the name of their module.
    """
    rules: dict[str, dict[str, Any]] = {name: dict(rule) for name, rule in recipe.overrides.items()}
    for name, width in bits.items():
        # A rule of that very name moves to the end: it has to keep what the rules behind it made of its knobs.
        at, earlier = recipe.at(name), rules.pop(name, {})
        activations = {"act_bits": at.act_bits} if recipe.rule_bits == "both" else {}  # the weights' bits alone were chosen
        rules[name] = {knob: getattr(at, knob) for knob in earlier if knob not in _FOLLOW_BITS} | {"bits": width} | activations
    return rules
