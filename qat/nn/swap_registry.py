"""Table of swaps (functions that replace a module) by class *object* and intent.

Class names would be ambiguous: timm has two unrelated classes named `Attention`. To add a family of
models, write one file with `@register_swap(TheirClass, intent)`.
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

# Intent of attention classes for each value of the recipe's `attention`.
_ATTENTION_INTENTS = {
    "qkr": "qkr_attention",
    "standard": "attention",
    "float": "float_attention",
}


@dataclass(frozen=True)
class SwapContext:
    """Recipe and position of the module to replace.

    Attributes:
        recipe: the recipe at this module, with overrides applied.
        place: part of the model that contains the module: `stem`, `block` or `head`.
        input: range of the module's input: `signed`, `unsigned` (after an activation with at most a
            small negative tail), or `quantized` (already). With `float`, the module and all modules
            inside the module stay unchanged.
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

    def product_quantizer(self) -> Quantizer:
        """A quantizer for the product in `QkrAttention`, as for keys, but without offsets.

        `QkrAttention.product_offset` replaces the offset before the quantizer.
        """
        spec = self.recipe.act_spec("k", self.place)
        return build_quantizer(dataclasses.replace(spec, offsets="none"))

    def input_quantizer(self, role: str = "input") -> nn.Module:
        """A quantizer of the module's input; an identity if the input is already quantized."""
        return nn.Identity() if self.input == "quantized" else self.act(role)

    def conv_input_quantizer(self) -> Quantizer:
        """A quantizer for a convolution's input (B, C, H, W), without offsets.

        There is one scale for the tensor; block formats have blocks along C. With offsets, the
        zeros of the convolution's padding would not be on the grid.
        """
        spec = self.recipe.act_spec("input", self.place, signed=self.input != "unsigned")
        return build_quantizer(dataclasses.replace(spec, axis=None, offsets="none"))


@dataclass(frozen=True)
class Swap:
    """Result of a swap.

    Attributes:
        module: the replacement; may be the replaced module itself.
        inputs: input ranges of the module's children (`SwapContext.input`), by name.
        children: replacements of the module's children, by name.
    """

    module: nn.Module
    inputs: Mapping[str, str] = field(default_factory=dict)
    children: Mapping[str, nn.Module] = field(default_factory=dict)


# A function that gets a module of the class that it is registered for, and the context.
SwapFunction = Callable[[Any, SwapContext], Swap]
_SWAPS: dict[tuple[type[nn.Module], str], SwapFunction] = {}


def register_swap(cls: type[nn.Module], intent: str) -> Callable[[SwapFunction], SwapFunction]:
    """Use the decorated function for modules whose class is exactly `cls`.

    Args:
        cls: a class of modules.
        intent: `linear`, `conv`, `attention` or `qkr_attention`; `float_attention` for classes that
            use the weights of their Linears without calling the Linears; `fqvit` for swaps that are
            tried first with placement `fqvit`; `fqvit_net` for the model itself with this
            placement.
    """

    def add(function: SwapFunction) -> SwapFunction:
        _SWAPS[cls, intent] = function
        return function

    return add


def find_swap(module: nn.Module, context: SwapContext) -> SwapFunction | None:
    """The swap for a module. Returns None if the module stays unchanged.

    Modules with a replaced `forward` stay unchanged, and so do Linears and convolutions that are
    not plain (see `is_plain_layer`). An attention class that has no swap for the recipe's intent
    stays float, except for its Linears.
    """
    if "forward" in vars(module):
        return None
    if isinstance(module, nn.Linear | nn.Conv2d) and not is_plain_layer(module):
        return None
    recipe = context.recipe
    for intent in (recipe.placement, _ATTENTION_INTENTS[recipe.attention], "linear", "conv"):
        swap = _SWAPS.get((type(module), intent))
        if swap is not None:
            return swap
    return None


def is_plain_layer(layer: nn.Module) -> bool:
    """True for a Linear or convolution of a registered class with only a weight and a bias.

    A pruned, normalized or adapted layer has additional parameters, buffers or children.
    """
    is_known = any((type(layer), intent) in _SWAPS for intent in ("linear", "conv"))
    has_extras = bool(layer._buffers or layer._modules)
    return is_known and set(layer._parameters) == {"weight", "bias"} and not has_extras


def is_attention(module: nn.Module) -> bool:
    """True for a module whose class is registered as an attention; False once it is swapped."""
    return any((type(module), intent) in _SWAPS for intent in _ATTENTION_INTENTS.values())


def swap_net(net: nn.Module, context: SwapContext) -> Swap:
    """Swap the model itself as the recipe's placement requires; the model stays the same object.

    Raises:
        UsageError: this model cannot have the recipe's placement or integer norms.
    """
    swap = _SWAPS.get((type(net), f"{context.recipe.placement}_net"))
    if swap is not None:
        return swap(net, context)
    if context.recipe.layernorm == "integer":
        raise UsageError(
            f"ptq.layernorm='integer': only for ViT and DeiT, not {type(net).__name__}; "
            "must be float"
        )
    return Swap(net)
