"""Which module is swapped for what. Keyed by class *object* and intent: timm has two unrelated classes named `Attention`.

A new family is one file with `@register_swap(TheirClass, intent)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qat.errors import UsageError
from qat.quantizers import Quantizer, build_quantizer
from qat.spec import QuantRecipe


@dataclass(frozen=True)
class SwapContext:
    """What a swap is given about the module it replaces.

    Attributes:
        recipe: the recipe at this module, overrides applied.
        place: `stem`, `block` or `head`.
        input: what arrives: `signed`, `unsigned` (after an activation without negative tail), or `quantized` already.
            A child whose parent calls it `float` is left alone with all that is in it.
    """

    recipe: QuantRecipe
    place: str
    input: str = "signed"

    def weight(self, role: str = "weight") -> Quantizer:
        """A weight quantizer for this place."""
        return build_quantizer(self.recipe.weight_spec(self.place, role))

    def act(self, role: str) -> Quantizer:
        """An activation quantizer for this place."""
        return build_quantizer(
            self.recipe.act_spec(role, self.place, signed=self.input != "unsigned")
        )

    def product(self) -> Quantizer:
        """QKR's key: signed, one scale per position; its offset in front is a bias of the map that makes it."""
        return build_quantizer(
            dataclasses.replace(self.recipe.act_spec("k", self.place), offsets="none")
        )

    def input_quantizer(self, role: str = "input") -> nn.Module:
        """The quantizer of the module's input; nothing where it is quantized already."""
        return nn.Identity() if self.input == "quantized" else self.act(role)

    def planes(self) -> Quantizer:
        """A convolution's input (B, C, H, W): one scale, and no offsets: the zeros that it pads with have to be on the grid."""
        spec = self.recipe.act_spec("input", self.place, signed=self.input != "unsigned")
        return build_quantizer(dataclasses.replace(spec, axis=None, offsets="none"))


@dataclass(frozen=True)
class Swap:
    """What a swap gives back.

    Attributes:
        module: takes the place; may be the module that was there.
        inputs: what its children receive (`SwapContext.input`), by name.
        children: modules that take the place of its children, by name.
    """

    module: nn.Module
    inputs: Mapping[str, str] = field(default_factory=dict)
    children: Mapping[str, nn.Module] = field(default_factory=dict)


# Of the class that it is registered for.
SwapFunction = Callable[[Any, SwapContext], Swap]
_SWAPS: dict[tuple[type[nn.Module], str], SwapFunction] = {}


def register_swap(cls: type[nn.Module], intent: str) -> Callable[[SwapFunction], SwapFunction]:
    """Use the decorated function for modules whose class is exactly `cls`.

    Args:
        cls: of timm or torch.
        intent: `linear`, `conv`, `attention`, `qkr_attention`; `float_attention` for classes that would go around a quantized Linear:
            they use its weight without calling it; `fqvit`, which comes first where post-training quantization also stands after layers;
            `fqvit_net` for the net itself.
    """

    def add(function: SwapFunction) -> SwapFunction:
        _SWAPS[cls, intent] = function
        return function

    return add


def find_swap(module: nn.Module, context: SwapContext) -> SwapFunction | None:
    """The swap for a module, or None where it stays as it is, as layers do that are more than a Linear or a convolution (`is_plain`).

    An attention class without a swap of the recipe's intent stays float around its quantized Linears.
    """
    attention = {"qkr": "qkr_attention", "standard": "attention", "float": "float_attention"}[
        context.recipe.attention
    ]
    intents = (context.recipe.placement, attention, "linear", "conv")
    if "forward" in vars(module) or (
        isinstance(module, nn.Linear | nn.Conv2d) and not is_plain(module)
    ):
        return None
    return next(
        (_SWAPS[type(module), intent] for intent in intents if (type(module), intent) in _SWAPS),
        None,
    )


def is_plain(layer: nn.Module) -> bool:
    """True for a Linear or convolution of a known class that has a weight, a bias and no more: not pruned, normalised or adapted."""
    is_known = any((type(layer), intent) in _SWAPS for intent in ("linear", "conv"))
    return (
        is_known
        and set(layer._parameters) == {"weight", "bias"}
        and not (layer._buffers or layer._modules)
    )


def is_attention(module: nn.Module) -> bool:
    """True for a module, not yet swapped, of a class with a swap of some `attention`."""
    return any(
        (type(module), intent) in _SWAPS
        for intent in ("qkr_attention", "attention", "float_attention")
    )


def swap_net(net: nn.Module, context: SwapContext) -> Swap:
    """What the recipe's placement does to the net itself; it stays the same object.

    Raises:
        UsageError: integer norms are wanted of a net that nobody taught what stands around its norms.
    """
    swap = _SWAPS.get((type(net), f"{context.recipe.placement}_net"))
    if swap is None and context.recipe.layernorm == "integer":
        raise UsageError(
            f"ptq.layernorm='integer': only for ViT and DeiT, not {type(net).__name__}; here it must be float"
        )
    return Swap(net) if swap is None else swap(net, context)
