"""Quantized attention of Transformers' models, through the library's attention interface.

An attention of Transformers computes queries, keys and values itself, and calls the function that
the model's `attn_implementation` names. `attend` is such a function: it quantizes queries, keys,
values and probabilities of attentions with `HeadProducts`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Generator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.kernels.fused import probs_dtype
from qat.nn.attention import quantize_heads
from qat.nn.swap_registry import SwapContext
from qat.spec import QuantRecipe

NAME = "qat"  # name of the function, for `attn_implementation`
CHILD = "quantized"  # name of an attention's child; this child has the quantizers

# Activations with a small negative tail that do not call torch's own GELU.
_ACTIVATIONS = (
    "AccurateGELUActivation",
    "FastGELUActivation",
    "NewGELUActivation",
    "QuickGELUActivation",
)

# The search for attentions that is in progress.
_search: ContextVar[AttentionInterface | None] = ContextVar("_search", default=None)


class HeadProducts(nn.Module):
    """The two products of each attention head, with quantized operands: scores and sums of values.

    Args:
        context: recipe and place of the attention.
    """

    def __init__(self, context: SwapContext) -> None:
        super().__init__()
        self.q_quantizer = context.act("q")
        self.k_quantizer = context.act("k")
        self.v_quantizer = context.act("v")
        self.probs_quantizer = context.act("probs")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        factor: float = 1.0,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The sum of the quantized values, weighted by the quantized probabilities.

        Args:
            query: (B, h, N, d).
            key: (B, h/g, M, d); each group of g heads shares a head of keys.
            value: (B, h/g, M, e).
            mask: broadcastable to (B, h, N, M): float = added to the scores; boolean = True where a
                score counts; None = no mask.
            factor: factor on the scores.
            dropout: fraction of probabilities that are dropped in training.

        Returns:
            (B, N, h, e), and the quantized probabilities (B, h, N, M) after dropout.
        """
        heads_per_group = query.shape[1] // key.shape[1]
        keys = quantize_heads(key, self.k_quantizer)
        values = quantize_heads(value, self.v_quantizer)
        if heads_per_group > 1:
            keys = keys.repeat_interleave(heads_per_group, dim=1)
            values = values.repeat_interleave(heads_per_group, dim=1)
        scores = quantize_heads(query, self.q_quantizer) @ keys.transpose(-2, -1) * factor
        if mask is not None and mask.dtype is torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        probs = self.probs_quantizer(scores.softmax(dim=-1, dtype=probs_dtype(scores)))
        probs = nn.functional.dropout(probs, dropout, self.training)
        if probs.dtype != values.dtype:
            probs = probs.to(values.dtype)
        return (probs @ values).transpose(1, 2).contiguous(), probs

    def macs(self, query: Tensor, key: Tensor, value: Tensor) -> list[int]:
        """Multiply-accumulates of the scores, and of the sums of values."""
        num_scores = query[..., 0].numel() * key.shape[-2]
        return [num_scores * query.shape[-1], num_scores * value.shape[-1]]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute an attention, with the signature of Transformers' interface.

    Without `HeadProducts`, it is computed in float, and a search in progress may record it.

    Args:
        module: the attention that calls this function.
        query: (B, h, N, d).
        key: (B, h/g, M, d).
        value: (B, h/g, M, e).
        attention_mask: see `HeadProducts.forward`.
        scaling: factor on the scores; None = 1 / sqrt(d).
        dropout: fraction of probabilities that are dropped in training.
        settings: additional settings, which no quantized attention reads.

    Returns:
        (B, N, h, e), and the probabilities, which may be None in float.
    """
    products = module._modules.get(CHILD)
    if isinstance(products, HeadProducts):
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return products(query, key, value, attention_mask, factor, dropout)
    functions = sys.modules["transformers"].AttentionInterface()
    result: tuple[Tensor, Tensor | None] = functions["sdpa"](
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **settings
    )
    search = _search.get()
    # Do not record attentions that need `is_causal` or a position bias, as in language models:
    # quantized attention reads neither.
    is_causal = settings.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # as in Transformers
    is_causal = is_causal and attention_mask is None
    if search is not None and not is_causal and settings.get("position_bias") is None:
        search.record_call(module, result[0])
    return result


def activation_classes() -> tuple[type[nn.Module], ...]:
    """Activation classes of Transformers that `ActivationTracer` does not know.

    The result is empty if no model of Transformers was imported.
    """
    activations = sys.modules.get("transformers.activations")
    if activations is None:
        return ()
    return tuple(getattr(activations, name) for name in _ACTIVATIONS)


def hf_models(net: nn.Module) -> list[Any]:
    """The outermost models of Transformers in `net`; models inside these are left out."""
    # Do not get the class from `transformers` itself, which would import all of its classes now.
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None:
        return []
    models: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        # "" is the root, which contains everything.
        is_inside = any(not outer or name.startswith(f"{outer}.") for outer in models)
        if isinstance(module, base) and not is_inside:
            models[name] = module
    return list(models.values())


class AttentionInterface:
    """The attentions of Transformers in a model that is being converted.

    They are found by running the model inside `searching`, not by their classes.

    Args:
        net: any model, in float.

    Attributes:
        attentions: attentions that have called `attend`, in the order of their first calls.
        projections: layers whose input is the output of an attention.

    Raises:
        UsageError: `net` is a model of Transformers that needs inputs other than images.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.models = hf_models(net)
        self.attentions: dict[nn.Module, None] = {}
        self.projections: set[nn.Module] = set()
        self._outputs: dict[int, Tensor] = {}
        if self.models == [net]:
            _check_inputs(net)
        self.original_configs: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def searching(self) -> Generator[None]:
        """Find the attentions that run in a `with` block, which must run the whole model.

        After the block, models of Transformers still use `attend`; `restore` undoes this.
        """
        if self.models:
            _register_functions()
        for model in self.models:
            self._copy_configs(model)
            for module in _all_hf_models(model):
                if module._can_set_attn_implementation():
                    module.config._attn_implementation_internal = NAME
        token = _search.set(self)
        hooks = []
        if self.models:
            for module in self.net.modules():
                if isinstance(module, nn.Linear):
                    hooks.append(module.register_forward_pre_hook(self._record_projection))
        try:
            yield
        finally:
            _search.reset(token)
            self._outputs.clear()
            for hook in hooks:
                hook.remove()

    def record_call(self, attention: nn.Module, out: Tensor) -> None:
        """Record an attention that has called `attend`, and the output of the call."""
        self.attentions[attention] = None
        self._outputs[out.untyped_storage()._cdata] = out

    def _record_projection(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Record a layer whose input is the output of an attention."""
        if args and args[0].untyped_storage()._cdata in self._outputs:
            self.projections.add(layer)

    def add_quantizers(self, recipe: QuantRecipe) -> list[str]:
        """Add quantizers to attentions as the recipe says; return the names of all attentions.

        Raises:
            UsageError: the recipe has query-key reparameterization.
        """
        names = {module: name for name, module in self.net.named_modules()}
        for attention in self.attentions:
            rules = recipe.at(names[attention])
            if rules.attention == "qkr":
                raise UsageError(
                    "quant.attention='qkr': attentions of Transformers compute queries and keys "
                    "themselves; must be one of standard, float"
                )
            if rules.attention != "float":
                products = HeadProducts(SwapContext(rules, "block"))
                attention.add_module(CHILD, products.train(attention.training))
        if any(CHILD in attention._modules for attention in self.attentions):
            for model in self.models:
                for module in _all_hf_models(model):
                    module.set_attn_implementation = _refuse_implementation
        else:
            # If all attentions stay float, restore the model's own implementation.
            for module, config in self.original_configs:
                implementation = config._attn_implementation_internal
                module.config._attn_implementation_internal = implementation
        return [names[attention] for attention in self.attentions]

    def restore(self) -> None:
        """Remove the quantizers and restore the configs, after an error."""
        for attention in self.attentions:
            attention._modules.pop(CHILD, None)
        for module, config in self.original_configs:
            vars(module).pop("set_attn_implementation", None)
            module.config = config

    def write_config(self, recipe: dict[str, Any], input_size: Sequence[int], signs: str) -> None:
        """Write a conversion to the config of the model, which `save_pretrained` saves.

        Nothing is written if the model is not itself a model of Transformers.

        Args:
            recipe: settings of the recipe.
            input_size: (channels, height, width) of the images.
            signs: see `qat.model.convert.Conversion`.
        """
        if self.models == [self.net]:
            model = self.models[0]
            save_in_new_format(model)
            model.config.quantization_config = {
                "quant_method": NAME,
                "recipe": recipe,
                "input_size": list(input_size),
                "signs": signs,
            }

    def _copy_configs(self, model: Any) -> None:
        """Give a model a copy of its config, because other models may share the config."""
        copies: dict[int, Any] = {}
        copy.deepcopy(model.config, copies)
        for module in model.modules():
            config = getattr(module, "config", None)
            if id(config) in copies:
                self.original_configs.append((module, config))
                module.config = copies[id(config)]


def save_in_new_format(model: Any) -> None:
    """Let `save_pretrained` write the names of tensors that the installed version uses.

    `Trainer` cannot resume from files with the names of older versions.
    """
    save = type(model).save_pretrained.__get__(model)
    model.save_pretrained = functools.partial(save, save_original_format=False)


def _refuse_implementation(implementation: Any, *_: Any, **__: Any) -> None:
    """Take the place of `set_attn_implementation`, which would turn the quantizers off."""
    raise UsageError(
        f"set_attn_implementation({implementation!r}): the attention of this model is quantized; "
        "output_attentions=True works without it"
    )


def _all_hf_models(net: nn.Module) -> list[Any]:
    """All models of Transformers in `net`, including models inside other models."""
    base = sys.modules["transformers"].PreTrainedModel
    return [module for module in net.modules() if isinstance(module, base)]


def _check_inputs(model: Any) -> None:
    """Raise `UsageError` if a model of Transformers needs inputs other than images."""
    inputs = [model.main_input_name]
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.default is parameter.empty and parameter.kind.name == "POSITIONAL_OR_KEYWORD":
            inputs.append(name)
    if set(inputs) == {"pixel_values"}:
        return
    advice = ""
    inner_models = _all_hf_models(model)[1:]  # the first one is `model` itself
    for name, module in model.named_modules():
        if module in inner_models and module.main_input_name == "pixel_values":
            advice = f"; convert model.{name}"
            break
    raise UsageError(
        f"convert: {type(model).__name__} takes {', '.join(dict.fromkeys(inputs))}; "
        f"must be a model that takes only pixel_values{advice}"
    )


def _register_functions() -> None:
    """Register `attend` and its masks with Transformers."""
    transformers = importlib.import_module("transformers")
    masks = importlib.import_module("transformers.masking_utils")
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, masks.eager_mask)
