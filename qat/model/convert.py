"""Convert a model in place: replace some of its modules by quantized modules."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models import get_model_args, get_model_input_config
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat.errors import UsageError
from qat.model.products import warn_of_float
from qat.model.scales import guard
from qat.model.sites import iter_quantizers, no_weight_decay
from qat.nn import (
    ActivationTracer,
    AttentionInterface,
    FqNet,
    QkrAttention,
    Swap,
    SwapContext,
    activation_classes,
    find_swap,
    hf_models,
    is_attention,
    last_layers,
    named_outputs,
    swap_net,
)
from qat.quantizers import Quantizer
from qat.spec import PRESETS, QuantRecipe
from qat.utils.probing import probing, zero_image
from qat.utils.validate import check_images


@dataclass(frozen=True)
class Conversion:
    """How a model was converted, as stored in `net.qat_conversion` and in checkpoints.

    Attributes:
        recipe: the recipe.
        input_size: (channels, height, width) of the images for which scales and offsets were
            created.
        signs: which inputs have unsigned grids: `probe` = all inputs that come from an activation
            function; `tails` = these except inputs of convolutions after SiLU or Hardswish; `mlp` =
            only inputs of `fc2` in timm's `Mlp` after an activation function, as in older files.
    """

    recipe: QuantRecipe
    input_size: tuple[int, int, int]
    signs: str = "probe"


def conversion_of(net: nn.Module) -> Conversion | None:
    """The conversion of a model; None for a float model."""
    return getattr(net, "qat_conversion", None)


def own_input_size(net: nn.Module) -> tuple[int, int, int]:
    """Image size (channels, height, width) of a model, from its config.

    The first timm model in `net` counts, or else the first model of Transformers whose config has
    an image size.

    Raises:
        UsageError: there is no such model.
    """
    for module in net.modules():
        if getattr(module, "pretrained_cfg", None):
            channels, height, width = get_model_input_config(module)["input_size"]
            return get_model_args(module).get("in_chans", channels), height, width
    for model in hf_models(net):
        config = getattr(model.config, "vision_config", model.config)
        sides = getattr(config, "image_size", None)
        if sides is not None:
            height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
            return getattr(config, "num_channels", 3), height, width
    raise UsageError(
        "convert.input_size=None: must be (channels, height, width) of the images; "
        "unlike timm's models, this model does not record its input size"
    )


def convert(
    net: nn.Module, recipe: QuantRecipe, *, input_size: tuple[int, int, int] | None = None
) -> nn.Module:
    """Quantize a model in place. Weights do not change; scales have their final shape and are NaN.

    Until scales are set (by `qat.initialize_scales`, from a checkpoint or by hand), calling the
    model raises `UsageError`. A warning names modules that unexpectedly stay in float, such as an
    attention of an unknown class, if they run more than 1 % of the multiply-accumulates.

    Args:
        net: a float model on any device: a timm model, including models with `features_only=True`,
            or any module with linear layers. A model on the meta device can be filled later by
            `load_state_dict(assign=True)`.
        recipe: result of `qat.recipe(...)`; `fp` leaves the model in float.
        input_size: (channels, height, width) of the model's images; None = the size in the model's
            config.

    Returns:
        `net` itself.

    Raises:
        UsageError: the model is already converted or takes more than images, `recipe` is
            not a recipe, a rule of `overrides` matches no module, QKR or an integer LayerNorm is
            impossible, the model's config has no input size, the model cannot process an image of
            `input_size`, or training drops tokens although each token has its own scale. The model
            is then left unchanged.
    """
    exempt = apply_recipe(net, recipe, input_size=input_size)
    conversion = conversion_of(net)
    if conversion is not None:
        warn_of_float(net, recipe, conversion.input_size, exempt)
    return net


def apply_recipe(
    net: nn.Module,
    recipe: QuantRecipe,
    *,
    input_size: tuple[int, int, int] | None,
    signs: str | None = None,
) -> list[str]:
    """Do the work of `convert`, without its warning; also used to rebuild converted models.

    Args:
        net: see `convert`.
        recipe: see `convert`.
        input_size: see `convert`.
        signs: see `Conversion`; None = `tails` for models of Transformers, `probe` for others. If
            it is set, the model counts as rebuilt, and rules of the recipe need not match a module.

    Returns:
        Names of modules that stay in float on purpose.

    Raises:
        UsageError: see `convert`.
    """
    if any(conversion_of(module) is not None for module in net.modules()):
        raise UsageError(
            "convert: the model is already quantized; build a new model. On the command line, "
            "ckpt=FILE loads a quantized checkpoint into another recipe."
        )
    if not isinstance(recipe, QuantRecipe):
        raise UsageError(f"convert: recipe={recipe!r}: must be the result of qat.recipe(...)")
    interface = AttentionInterface(net)
    if input_size is None:
        input_size = own_input_size(net)
    check_images("convert", {"input_size": input_size})
    size: tuple[int, int, int] = tuple(input_size)  # type: ignore[assignment]
    if recipe.name == "fp":
        _check_rules(net, recipe, [])
        check_input(net, size)
        return []
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    attentions = [name for name, module in net.named_modules() if is_attention(module)]
    original_class = type(net)
    original_modules = dict(net._modules)
    is_rebuilt = signs is not None
    if signs is None:
        signs = "tails" if hf_models(net) else "probe"
    tracer = ActivationTracer(activation_classes(), signed_tails=signs == "tails")
    try:
        if signs != "mlp":
            # The tracer needs the version counters of tensors, which inference mode does not keep.
            with tracer, interface.searching(), torch.inference_mode(mode=False):
                check_input(net, size, tracer.register_hooks(net))
        places = stem_and_heads(net) | _transformers_heads(net, size)
        walk = _Walk(recipe, places, tracer.unsigned_inputs(), interface.projections, swapped)
        _swap_children(net, "", walk, swap_net(net, SwapContext(recipe.at(""), "block")))
        if isinstance(net, FqNet):
            net.connect_norms()
        attentions += interface.add_quantizers(recipe)
        _check_tied(net, swapped)
        _allocate(net, size, swapped)
        if not is_rebuilt:  # the rules of a file may name a head that was removed later
            _check_rules(net, recipe, attentions)
        _check_dropping(net, recipe)
    except BaseException:  # also when interrupted
        for parent, name, child in reversed(swapped):
            _set_child(parent, name, child)
        net.__class__ = original_class
        net._modules = original_modules
        interface.restore()
        raise
    net.qat_conversion = Conversion(recipe, size, signs)  # type: ignore[assignment]
    interface.write_config(recipe.to_dict(), size, signs)
    _set_timm_methods(net)
    guard(net)
    return walk.in_float


def _set_timm_methods(net: nn.Module) -> None:
    """Set the methods of a converted model that timm calls."""
    # Patterns with `*.` also match names in a compiled model, which have a prefix.
    names = no_weight_decay(net)
    patterns = {f"*.{name}" for name in names}
    # Each call returns a new set.
    net.no_weight_decay = functools.partial(set, names | patterns)  # type: ignore[assignment]
    for module in net.modules():
        # `timm.utils.reparameterize_model` calls these methods, which would drop quantizers.
        for method in ("fuse", "reparameterize", "switch_to_deploy"):
            if hasattr(type(module), method):
                setattr(module, method, _refuse_reparameterization)


def _check_rules(net: nn.Module, recipe: QuantRecipe, attentions: list[str]) -> None:
    """Check that each rule matches a module with quantizers, or an attention.

    A rule for an attention needs no quantizers, because it may itself leave the attention in float.
    Rules of presets need no match: they concern attentions, which not every model has.
    """
    names = [*dict.fromkeys(site.layer for site in iter_quantizers(net)), *attentions]
    preset_rules = {rule for preset in PRESETS.values() for rule in preset.get("overrides", {})}
    for pattern in recipe.overrides:
        if pattern in preset_rules or fnmatch.filter(names, pattern):
            continue
        names += [name for name, _ in net.named_modules()]
        example = next((name for name in names if name.count(".") >= 2), names[-1])
        raise UsageError(
            f"{recipe.GROUP}.overrides[{pattern!r}]: must match a quantized module; "
            f"names look like {example!r}"
        )


def _check_tied(net: nn.Module, swapped: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Check that no attention with QKR shares weights, because QKR would separate them."""
    attentions = []
    for parent, name, old in swapped:
        if isinstance(getattr(parent, name), QkrAttention) and old not in attentions:
            attentions.append(old)
    # The swaps have already removed the weights of these attentions from `net`.
    used_parameters = set(net.parameters())
    for attention in attentions:
        parameters = set(attention.qkv.parameters())  # type: ignore[union-attr]
        if parameters & used_parameters:
            raise UsageError(
                "quant.attention='qkr': this model ties qkv to another layer; "
                "must be one of standard, float"
            )
        used_parameters |= parameters


def _check_dropping(net: nn.Module, recipe: QuantRecipe) -> None:
    """Check that quantization-aware training drops no tokens if each token has its own scale.

    Scales belong to positions, and dropping a token moves all later tokens to earlier positions.
    """
    rates = []
    for module in net.modules():
        if isinstance(module, PatchDropout | PatchDropoutWithIndices):
            rates.append(module.prob)
    rate = max(rates, default=getattr(net, "patch_drop_rate", 0))  # Hiera stores its rate here
    has_token_scales = any(
        site.quantizer.axis == -2 and site.quantizer.num_stored_scales
        for site in iter_quantizers(net)
    )
    if rate and has_token_scales and recipe.GROUP == "quant":
        raise UsageError(
            f"model.args.patch_drop_rate={rate}: {recipe.name} has scales for each token; "
            "must be 0, or use quant.act_scales=tensor"
        )


def stem_and_heads(net: nn.Module) -> dict[str, str]:
    """Names of the first convolution and the classifiers, with `stem` or `head` as values.

    The names come from timm's config of the model, or of models inside it; `head` is always a head.
    If the model has no module with the stem's name, as can happen with `features_only=True`, the
    stem is the first `nn.Conv2d`, if any.
    """
    modules = dict(net.named_modules())
    places = {"head": "head"}
    for name, module in modules.items():
        config = getattr(module, "pretrained_cfg", None) or {}
        for key, place in (("classifier", "head"), ("first_conv", "stem")):
            parts = config.get(key) or ()
            if isinstance(parts, str):
                parts = [parts]
            for part in parts:
                places[f"{name}.{part}".lstrip(".")] = place
    if not any(places.get(name) == "stem" for name in modules):
        convolutions = [name for name, m in modules.items() if isinstance(m, nn.Conv2d)]
        if convolutions:
            places[convolutions[0]] = "stem"
    return places


def _transformers_heads(net: nn.Module, input_size: tuple[int, int, int]) -> dict[str, str]:
    """Names of layers that compute outputs of Transformers' models, each with the value `head`."""
    models = hf_models(net)
    if not models:
        return {}
    with probing(net, ()):
        heads = last_layers(net, models, zero_image(net, input_size))
    named_modules = net.named_modules(remove_duplicate=False)  # a shared layer has several names
    return {name: "head" for name, module in named_modules if module in heads}


def recipe_of(net: nn.Module) -> QuantRecipe | None:
    """The current recipe of a model; None for a float model.

    If a Linear or `Conv2d` has replaced a head that `stem_and_heads` finds, the new layer stays in
    float.
    """
    conversion = conversion_of(net)
    if conversion is None:
        return None
    net = getattr(net, "_orig_mod", net)  # a compiled model
    modules = dict(net.named_modules())
    overrides = dict(conversion.recipe.overrides)
    for name, place in stem_and_heads(net).items():
        if place == "head" and type(modules.get(name)) in {nn.Linear, nn.Conv2d}:
            overrides.pop(name, None)  # so that the new rule becomes the last one
            overrides[name] = {"weight_quantizer": "float", "act_quantizer": "float"}
    return dataclasses.replace(conversion.recipe, overrides=overrides)


@dataclass(frozen=True)
class _Walk:
    """Inputs and results of a walk through a model.

    Attributes:
        recipe: the recipe.
        places: see `stem_and_heads`.
        unsigned_inputs: layers that `ActivationTracer.unsigned_inputs` found.
        projections: layers of Transformers' models that do what `attn.proj` does in timm.
        swapped: parent, name and replaced module of each swap.
        replacements: new modules by old module and kind of input (`SwapContext.input`). A module
            with several names thus gets one replacement per kind.
        in_float: names of modules that stay in float on purpose.
    """

    recipe: QuantRecipe
    places: dict[str, str]
    unsigned_inputs: frozenset[nn.Module]
    projections: Collection[nn.Module]
    swapped: list[tuple[nn.Module, str, nn.Module]]
    replacements: dict[tuple[nn.Module, str], nn.Module] = field(default_factory=dict)
    in_float: list[str] = field(default_factory=list)


def _swap_children(module: nn.Module, name: str, walk: _Walk, outer: Swap) -> None:
    """Swap the children of a module, and then their children. `outer` is the module's own swap."""
    # `named_children` would list only the first name of a module that has several names.
    for child_name, child in list(module._modules.items()):
        path = f"{name}.{child_name}".lstrip(".")
        input_kind = outer.inputs.get(child_name, "signed")
        # The low-rank factors of PEFT's LoRA also stay in float, next to a quantized layer.
        if input_kind == "float" or child_name.startswith("lora_"):
            walk.in_float.append(path)
            continue
        if child is None or isinstance(child, Quantizer):
            continue
        if child_name in outer.children:
            child = _replace_child(module, child_name, outer.children[child_name], walk)
        if input_kind == "signed" and child in walk.unsigned_inputs:
            input_kind = "unsigned"
        replacement = walk.replacements.get((child, input_kind))
        if replacement is not None:
            _replace_child(module, child_name, replacement, walk)
            continue
        aliases = [f"{path}.attn.proj"] if child in walk.projections else []
        rules = walk.recipe.at(path, *aliases)
        context = SwapContext(rules, walk.places.get(path, "block"), input_kind)
        swap = find_swap(child, context)
        inner = Swap(child) if swap is None else swap(child, context)
        new = _replace_child(module, child_name, inner.module, walk)
        walk.replacements[child, input_kind] = new
        _swap_children(inner.module, path, walk, inner)


# Children and tensors of timm's attentions that our attentions replace or do not need.
_REPLACED_CHILDREN = frozenset({"qkv", "q_norm", "k_norm", "k_bias", "v_bias", "softmax"})


def _replace_child(parent: nn.Module, name: str, new: nn.Module, walk: _Walk) -> nn.Module:
    """Replace a child of a module.

    Hooks, attributes, tensors and children that the new child lacks are taken from the old child,
    except for `_REPLACED_CHILDREN`.
    """
    old = getattr(parent, name)
    if new is old:
        return new
    walk.swapped.append((parent, name, old))
    for key, value in vars(old).items():
        if "hook" in key:
            has_own_hooks = isinstance(value, dict) and vars(new).get(key)
            if not has_own_hooks:
                # Move the dictionary itself, so that existing handles can still remove their hooks.
                setattr(new, key, value)
        elif not hasattr(new, key):
            setattr(new, key, value)
    for kind in ("_parameters", "_buffers", "_modules"):
        for key, value in vars(old)[kind].items():
            if value is not None and key not in _REPLACED_CHILDREN and not hasattr(new, key):
                vars(new)[kind][key] = value
    _set_child(parent, name, new.train(old.training))
    return new


def _set_child(parent: nn.Module, name: str, new: nn.Module) -> None:
    """Replace a child of a module, also in the module's plain Python lists.

    Some models call their children through such lists.
    """
    old = getattr(parent, name)
    setattr(parent, name, new)
    for value in vars(parent).values():
        if not isinstance(value, list):
            continue
        for index, item in enumerate(value):
            if item is old:
                value[index] = new


def _refuse_reparameterization(*_: object, **__: object) -> None:
    raise UsageError(
        "reparameterize: the model is already quantized and would lose its quantizers; "
        "reparameterize first, then convert"
    )


def check_input(
    net: nn.Module, input_size: tuple[int, int, int], hooks: Iterable[RemovableHandle] = ()
) -> dict[str, Tensor]:
    """Run a model on one image of zeros, of the size `input_size` (channels, height, width).

    Afterwards, the hooks whose handles are in `hooks` are removed.

    Returns:
        The outputs by name, see `named_outputs`.

    Raises:
        UsageError: the model cannot process such an image.
    """
    try:
        with probing(net, hooks):
            out = net(zero_image(net, input_size))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        own_size = "the size in the model's config" if hf_models(net) else "model.args.img_size"
        raise UsageError(
            f"input_size={input_size}: the model does not accept images of this size ({error}); "
            f"data.image_size and {own_size} must agree"
        ) from error
    return named_outputs(out)


def _allocate(
    net: nn.Module,
    input_size: tuple[int, int, int],
    swapped: list[tuple[nn.Module, str, nn.Module]],
) -> None:
    """Create scales and offsets in a forward pass; their shapes depend on the number of tokens.

    Swaps of modules whose quantizers the forward pass does not call are undone: these quantizers
    would never get a scale. The model may read the weights of such modules directly.
    """
    num_scales_by_quantizer: dict[Quantizer, int] = {}

    def allocate(quantizer: Any, args: tuple[Tensor, ...]) -> None:
        shape = args[0].shape
        num_scales = quantizer.num_scales(shape)
        if num_scales_by_quantizer.setdefault(quantizer, num_scales) != num_scales:
            quantizer.share_scale()
        quantizer.allocate(shape, args[0].device)

    hooks = [site.quantizer.register_forward_pre_hook(allocate) for site in iter_quantizers(net)]
    check_input(net, input_size, hooks)
    is_called: dict[nn.Module, bool] = {}
    for site in iter_quantizers(net):
        is_allocated = site.quantizer in num_scales_by_quantizer
        is_called[site.owner] = is_called.get(site.owner, False) or is_allocated
    never_called = []
    for parent, name, old in swapped:
        if not is_called.get(getattr(parent, name), True):
            never_called.append((parent, name, old))
    for parent, name, old in never_called:
        old.train(getattr(parent, name).training)
        _set_child(parent, name, old)
        swapped.remove((parent, name, old))
