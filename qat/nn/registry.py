"""Which module is swapped for what. Keyed by class *object* and intent: timm has two unrelated classes named `Attention`.

A new family is one file with `@register_swap(TheirClass, intent)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from qat.quantizers import Quantizer, build_quantizer
from qat.spec import QuantRecipe

INTENTS = ("linear", "conv", "attention", "qkr_attention")


@dataclass(frozen=True)
class SwapContext:
    """What a swap is told about the module it replaces.

    Attributes:
        recipe: the recipe at this module, overrides applied.
        place: `stem`, `block` or `head`.
        input: what arrives: `signed`, `unsigned` (behind an activation without negative tail), or `quantized` already.
    """

    recipe: QuantRecipe
    place: str
    input: str = "signed"

    def weight(self, role: str = "weight") -> Quantizer:
        """A weight quantizer for this place."""
        return build_quantizer(self.recipe.weight_spec(self.place, role))

    def act(self, role: str) -> Quantizer:
        """An activation quantizer for this place."""
        return build_quantizer(self.recipe.act_spec(role, self.place, signed=self.input != "unsigned"))

    def product(self) -> Quantizer:
        """QKR's key: signed, one scale per position; its offset in front is a bias of the map that makes it."""
        return build_quantizer(dataclasses.replace(self.recipe.act_spec("k", self.place), offsets="none"))

    def input_quantizer(self, role: str = "input") -> nn.Module:
        """The quantizer of the module's input; nothing where it is quantized already."""
        return nn.Identity() if self.input == "quantized" else self.act(role)


@dataclass(frozen=True)
class Swap:
    """What a swap gives back: the module that takes the place, and what its children receive (`SwapContext.input` by name)."""

    module: nn.Module
    inputs: Mapping[str, str] = field(default_factory=dict)


SwapFunction = Callable[[nn.Module, SwapContext], Swap]
_SWAPS: dict[tuple[type[nn.Module], str], SwapFunction] = {}


def register_swap(cls: type[nn.Module], intent: str) -> Callable[[SwapFunction], SwapFunction]:
    """Use the decorated function for modules whose class is exactly `cls`, under `intent` (one of `INTENTS`)."""
    if intent not in INTENTS:
        raise ValueError(f"intent={intent!r}: allowed are {', '.join(INTENTS)}")

    def add(function: SwapFunction) -> SwapFunction:
        _SWAPS[cls, intent] = function
        return function

    return add


def find_swap(module: nn.Module, context: SwapContext) -> SwapFunction | None:
    """The swap for a module, or None where it stays as it is.

    An attention class without a swap of the recipe's intent stays float around its quantized Linears.
    """
    attention = {"qkr": "qkr_attention", "standard": "attention", "float": ""}[context.recipe.attention]
    convolution = "conv" if context.place == "stem" else ""
    for intent in (attention, "linear", convolution):
        if (type(module), intent) in _SWAPS:
            return _SWAPS[type(module), intent]
    return None
