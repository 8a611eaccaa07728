"""Surgery on a timm net: the same object comes out, with some modules swapped."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models import get_model_args, get_model_input_config
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat.errors import UsageError
from qat.model.products import matmuls
from qat.model.scales import guard
from qat.model.sites import iter_quantizers, no_weight_decay
from qat.nn import (
    ActivationTracer,
    FqNet,
    QkrAttention,
    Swap,
    SwapContext,
    find_swap,
    is_attention,
    swap_net,
)
from qat.quantizers import Quantizer
from qat.spec import PRESETS, QuantRecipe
from qat.utils.probing import probing, zero_image
from qat.utils.validate import FLOAT_BITS, check_images

# Warn where a model keeps more than this share of its multiply-accumulates in float.
_MOST_FLOAT = 0.01


@dataclass(frozen=True)
class Conversion:
    """What was done to a net; kept as `net.qat_conversion` and written into its checkpoints.

    Attributes:
        recipe: what to quantize and how.
        input_size: (channels, height, width) of the images; scales and offsets are made for it.
        signs: inputs on unsigned grids: those that come from an activation function (`probe`), or only of timm's `Mlp` (`mlp`), as
            in older files.
    """

    recipe: QuantRecipe
    input_size: tuple[int, int, int]
    signs: str = "probe"


def conversion_of(net: nn.Module) -> Conversion | None:
    """How `net` was converted, or None for a float net."""
    return getattr(net, "qat_conversion", None)


def own_input_size(net: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images of a timm model, or of the first one inside a module.

    Raises:
        UsageError: there is none.
    """
    for module in net.modules():
        if getattr(module, "pretrained_cfg", None):
            channels, height, width = get_model_input_config(module)["input_size"]
            return get_model_args(module).get("in_chans", channels), height, width
    raise UsageError(
        "convert.input_size=None: must be (channels, height, width) of the images; "
        "the model is not one of timm's, which know it"
    )


def convert(
    net: nn.Module, recipe: QuantRecipe, *, input_size: tuple[int, int, int] | None = None
) -> nn.Module:
    """Quantize a timm net in place. All weights are kept; scales exist in their final shape, NaN until initialised.

    Until scales are set, by `qat.initialize_scales`, a checkpoint or by hand, calling the net raises `UsageError`. Warns where more
    than 1 % of the multiply-accumulates stay in float that the recipe quantizes, as in an attention of an unknown class.

    Args:
        net: a timm model, also one with `features_only=True`, or any module with Linears; in float.
        recipe: `qat.recipe(...)`; `fp` leaves the net untouched.
        input_size: (channels, height, width) of its images; None = as timm has it for the model.

    Returns:
        `net` itself.

    Raises:
        UsageError: the net is converted already, a rule of `overrides` matches no module, QKR cannot
            hold, no image of `input_size` passes through, or tokens with scales of their own are dropped in training. The net is then
            as it was.
    """
    exempt = apply_recipe(net, recipe, input_size=input_size)
    conversion = conversion_of(net)
    if conversion is not None:
        _warn_of_float(net, recipe, conversion.input_size, exempt)
    return net


def apply_recipe(
    net: nn.Module,
    recipe: QuantRecipe,
    *,
    input_size: tuple[int, int, int] | None,
    signs: str = "probe",
) -> list[str]:
    """`convert` without its warning, for a net that was converted before.

    Args:
        net: see `convert`.
        recipe: see `convert`.
        input_size: see `convert`.
        signs: see `Conversion`.

    Returns:
        Names of modules that a swap leaves in float on purpose.
    """
    if any(conversion_of(module) is not None for module in net.modules()):
        raise UsageError(
            "convert: the model is already quantized; build a new one, or load a checkpoint into another recipe with ckpt="
        )
    if not isinstance(recipe, QuantRecipe):
        raise UsageError(f"convert: recipe={recipe!r}: must be what qat.recipe(...) gives")
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
    before = type(net), dict(net._modules)
    tracer = ActivationTracer()
    if signs == "probe":
        with tracer:
            check_input(net, size, tracer.hooks(net))
    walk = _Walk(recipe, stem_and_heads(net), tracer.unsigned_inputs(), swapped)
    try:
        _walk(net, "", walk, swap_net(net, SwapContext(recipe.at(""), "block")))
        if isinstance(net, FqNet):
            net.connect()
        _check_tied(net, swapped)
        _allocate(net, size, swapped)
        _check_rules(net, recipe, attentions)
        _check_dropping(net, recipe)
    except Exception:
        for parent, name, child in reversed(swapped):
            setattr(parent, name, child)
        net.__class__, net._modules = before
        raise
    net.qat_conversion = Conversion(recipe, size, signs)  # type: ignore[assignment]
    # timm's hook; what it names stays, as all parameters are there from here on.
    # timm takes patterns: `torch.compile` puts a prefix before names, and asks the net that it wraps.
    names = no_weight_decay(net)
    net.no_weight_decay = functools.partial(set, names | {f"*.{name}" for name in names})  # type: ignore[assignment]
    for module in net.modules():  # timm.utils.reparameterize_model calls what a module has of these
        for method in ("fuse", "reparameterize", "switch_to_deploy"):
            if hasattr(type(module), method):
                setattr(module, method, _refuse_reparameterization)
    guard(net)
    return walk.in_float


def _warn_of_float(
    net: nn.Module, recipe: QuantRecipe, input_size: tuple[int, int, int], exempt: list[str]
) -> None:
    """Name the modules whose products stay in float though the recipe quantizes such products, if their share is large."""
    modules = dict(net.named_modules())
    products = matmuls(net, input_size)
    in_float = []
    for product in products:
        local = recipe.at(product.module)
        if product.of_activations:
            wanted = (local.act_spec("k", "block"), local.act_spec("probs", "block"))
        else:
            wanted = (local.weight_spec("block"), local.act_spec("input", "block"))
        is_wanted = any(spec.bits != FLOAT_BITS for spec in wanted)
        is_exempt = any(f"{product.module}.".startswith(f"{name}.") for name in exempt)
        if is_wanted and not is_exempt and product.bits == (FLOAT_BITS, FLOAT_BITS):
            in_float.append(product)
    share = sum(product.macs for product in in_float) / max(sum(p.macs for p in products), 1)
    if share <= _MOST_FLOAT:
        return
    names = defaultdict(list)
    for name in dict.fromkeys(product.module for product in in_float):
        names[type(modules[name]).__name__].append(name or "(net)")
    shown = (
        f"{first} ({kind})" if not others else f"{first} and {len(others)} more ({kind})"
        for kind, (first, *others) in names.items()
    )
    warnings.warn(
        f"convert: {100 * share:.1f} % of the multiply-accumulates stay in float, which the recipe would quantize elsewhere: "
        f"{', '.join(shown)}",
        stacklevel=3,
    )


def _check_rules(net: nn.Module, recipe: QuantRecipe, attentions: list[str]) -> None:
    """A rule has to reach a module that owns quantizers or an attention, which may be in float by this very rule."""
    reached = [*dict.fromkeys(site.layer for site in iter_quantizers(net)), *attentions]
    own = PRESETS.get(recipe.name, {}).get(
        "overrides", {}
    )  # not every net has what a recipe says of attentions
    for pattern in recipe.overrides:
        if pattern not in own and not fnmatch.filter(reached, pattern):
            names = [*reached, *(name for name, _ in net.named_modules())]
            example = next((n for n in names if n.count(".") >= 2), names[-1])
            raise UsageError(
                f"{recipe.GROUP}.overrides[{pattern!r}]: must match a quantized module; names look like {example!r}"
            )


def _check_tied(net: nn.Module, swapped: list[tuple[nn.Module, str, nn.Module]]) -> None:
    """Query-key reparameterization gives an attention weights of its own: those that another layer uses too would be tied no more."""
    used = set(net.parameters())
    for old in dict.fromkeys(
        old for parent, name, old in swapped if isinstance(getattr(parent, name), QkrAttention)
    ):
        own = set(old.qkv.parameters())  # type: ignore[union-attr]
        if own & used:
            raise UsageError(
                "quant.attention='qkr': this model ties qkv to another layer; here it must be one of standard, float"
            )
        used |= own


def _check_dropping(net: nn.Module, recipe: QuantRecipe) -> None:
    """Scales follow the place of a token, which is another one where tokens before it are dropped; only training drops any."""
    rates = [
        module.prob
        for module in net.modules()
        if isinstance(module, PatchDropout | PatchDropoutWithIndices)
    ]
    rate = max(rates, default=getattr(net, "patch_drop_rate", 0))  # Hiera's own
    per_token = any(
        site.quantizer.axis == -2 for site in iter_quantizers(net) if site.quantizer.n_scales
    )
    if rate and per_token and recipe.GROUP == "quant":
        raise UsageError(
            f"model.args.patch_drop_rate={rate}: {recipe.name} has scales for each token; must be 0, or quant.act_scales=tensor"
        )


def stem_and_heads(net: nn.Module) -> dict[str, str]:
    """Names of the first convolution (`stem`) and the classifiers (`head`), from timm's own description of the net or of one in it.

    In a net of `features_only=True` modules may have other names than the description says: there the first convolution is looked for.
    """
    modules, places = dict(net.named_modules()), {"head": "head"}
    for name, module in modules.items():
        described = getattr(module, "pretrained_cfg", None) or {}
        for key, place in (("classifier", "head"), ("first_conv", "stem")):
            parts = described.get(key) or ()
            places |= {
                f"{name}.{part}".lstrip("."): place
                for part in ([parts] if isinstance(parts, str) else parts)
            }
    if "stem" not in {places.get(name) for name in modules}:
        places |= {
            next((name for name, m in modules.items() if isinstance(m, nn.Conv2d)), ""): "stem"
        }
    return places


def recipe_of(net: nn.Module) -> QuantRecipe | None:
    """The recipe that a net follows now, None for a float net: a head that was put there after the conversion is in float."""
    done = conversion_of(net)
    if done is None:
        return None
    modules = dict(net.named_modules())
    heads = [
        name
        for name, place in stem_and_heads(net).items()
        if place == "head" and type(modules.get(name)) in {nn.Linear, nn.Conv2d}
    ]
    in_float = {"weight_quantizer": "float", "act_quantizer": "float"}
    return dataclasses.replace(
        done.recipe, overrides={**done.recipe.overrides, **dict.fromkeys(heads, in_float)}
    )


@dataclass(frozen=True)
class _Walk:
    """What stays the same during a walk; `swapped` collects (parent, name, replaced module).

    `made` has what became of a module, by it and what arrives there (`SwapContext.input`): under all its names it is one module again.
    `in_float` has names of modules that a swap leaves in float.
    """

    recipe: QuantRecipe
    places: dict[str, str]
    unsigned_inputs: frozenset[nn.Module]
    swapped: list[tuple[nn.Module, str, nn.Module]]
    made: dict[tuple[nn.Module, str], nn.Module] = field(default_factory=dict)
    in_float: list[str] = field(default_factory=list)


def _walk(module: nn.Module, name: str, walk: _Walk, done: Swap) -> None:
    """One pre-order walk; after a swap it goes on into the new module's children."""
    for child_name, child in list(
        module._modules.items()
    ):  # `named_children` leaves out all but the first name of a module
        path = f"{name}.{child_name}".lstrip(".")
        arrives = done.inputs.get(child_name, "signed")
        if arrives == "float":
            walk.in_float.append(path)
            continue
        if child is None or isinstance(child, Quantizer):
            continue
        if child_name in done.children:
            child = _put(module, child_name, done.children[child_name], walk)
        if arrives == "signed" and child in walk.unsigned_inputs:
            arrives = "unsigned"
        known = walk.made.get((child, arrives))
        if known is not None:
            _put(module, child_name, known, walk)
            continue
        context = SwapContext(walk.recipe.at(path), walk.places.get(path, "block"), arrives)
        swap = find_swap(child, context)
        inner = Swap(child) if swap is None else swap(child, context)
        walk.made[child, arrives] = _put(module, child_name, inner.module, walk)
        _walk(inner.module, path, walk, inner)


# Of timm's attentions: what ours have in another form, or does nothing.
_REPLACED = frozenset({"qkv", "q_norm", "k_norm", "k_bias", "v_bias", "softmax"})


def _put(parent: nn.Module, name: str, new: nn.Module, walk: _Walk) -> nn.Module:
    old = getattr(parent, name)
    if new is old:
        return new
    walk.swapped.append((parent, name, old))
    for key, value in vars(old).items():
        if "hook" in key and not (isinstance(value, dict) and vars(new).get(key)):
            setattr(
                new, key, value
            )  # the dictionaries themselves: a handle that was given out for one of them still removes its hook
        elif not hasattr(new, key):
            setattr(new, key, value)
    for kind in ("_parameters", "_buffers", "_modules"):  # what somebody has added
        added = vars(old)[kind].items()
        vars(new)[kind].update({
            key: value
            for key, value in added
            if value is not None and key not in _REPLACED and not hasattr(new, key)
        })
    setattr(parent, name, new.train(old.training))
    return new


def _refuse_reparameterization(*_: object, **__: object) -> None:
    raise UsageError(
        "reparameterize: the model is already quantized and would lose its quantizers; reparameterize first, then convert"
    )


def check_input(
    net: nn.Module, input_size: tuple[int, int, int], hooks: Iterable[RemovableHandle] = ()
) -> torch.Size | None:
    """Shape of what a net makes of one image of `input_size` (channels, height, width), None if that is no tensor.

    Raises:
        UsageError: no such image passes through the net.
    """
    try:
        with probing(net, hooks):
            out = net(zero_image(net, input_size))
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split())
        fit = "data.image_size and model.args.img_size must agree"
        raise UsageError(
            f"input_size={input_size}: the model does not accept images of this size ({reason}); {fit}"
        ) from error
    return out.shape if isinstance(out, Tensor) else None


def _allocate(
    net: nn.Module,
    input_size: tuple[int, int, int],
    swapped: list[tuple[nn.Module, str, nn.Module]],
) -> None:
    """Give every quantizer its shapes by one probe forward: scales per position depend on the token count."""
    groups: dict[Quantizer, int] = {}

    def allocate(module: Any, args: tuple[Tensor, ...]) -> None:
        if groups.setdefault(module, module.n_groups(args[0].shape)) != module.n_groups(
            args[0].shape
        ):
            module.share_scale()
        module.allocate(args[0].shape, args[0].device)

    check_input(
        net,
        input_size,
        [site.quantizer.register_forward_pre_hook(allocate) for site in iter_quantizers(net)],
    )
    # Undo swaps of modules that the net never calls: it reads their weight past the quantizers, which would never get a scale.
    reached: dict[nn.Module, bool] = {}
    for site in iter_quantizers(net):
        reached[site.owner] = reached.get(site.owner, False) or site.quantizer in groups
    for entry in [
        (parent, name, old)
        for parent, name, old in swapped
        if not reached.get(getattr(parent, name), True)
    ]:
        parent, name, old = entry
        setattr(parent, name, old.train(getattr(parent, name).training))
        swapped.remove(entry)
