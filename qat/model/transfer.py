"""Transfer weights and scales from one model to a model with another recipe."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from qat.model.foreign_weights import add_biases
from qat.model.frozen import FrozenActivation, FrozenNonuniform, FrozenWeight
from qat.model.scales import is_ready
from qat.model.sites import Site, iter_quantizers
from qat.nn import QkrAttention, QuantAttention
from qat.quantizers import LSQ, Affine, Quantizer
from qat.quantizers.lsq import AutoSignLSQ

# Name of Swin's table of biases, and the standard deviation of its initial values.
_TABLE = "relative_position_bias_table"
_TABLE_STD = 0.02


def timm_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """Return the float weights of a model under timm's names, whatever its recipe.

    The result has no quantizers. With QKR, the weights of queries, keys and values are stacked into
    `qkv`; a dropped query bias becomes zeros, and so does the key bias, which does not change a
    softmax. Weights of a frozen model are dequantized from the codes; call this only if
    `can_recover_weights` is True.
    """
    state: dict[str, Tensor] = {}
    _collect(net, "", state)
    return state


def _collect(module: nn.Module, prefix: str, state: dict[str, Tensor]) -> None:
    if isinstance(module, Quantizer):
        return
    included: set[str] = set()
    if isinstance(module, QkrAttention):
        for name, tensor in module.timm_weights().items():
            state[prefix + name] = tensor
        included = {"v"}
    else:
        own_names = module._parameters.keys() | module._buffers.keys()
        for name, tensor in module.state_dict().items():
            if name in own_names:
                state[prefix + name] = tensor.detach()
        weight_quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(weight_quantizer, FrozenWeight):
            state[f"{prefix}weight"] = weight_quantizer()
    # If a layer has two names in a model, timm's state dict contains it under both names.
    for name, child in module._modules.items():
        if child is not None and name not in included:
            _collect(child, f"{prefix}{name}.", state)


def copy_scales(source: nn.Module, target: nn.Module) -> tuple[list[str], list[str]]:
    """Copy scales and offsets between quantizers with equal names, specs and shapes.

    Scales that are not set are not copied. LSQ quantizers without offsets can also take step sizes
    from a symmetric affine grid with the same number of codes.

    Args:
        source: a quantized model.
        target: a converted model.

    Returns:
        Names of the quantizers whose scales were copied, and of those that still need data.
    """
    donors = {site.name: site for site in iter_quantizers(source)}
    copied = []
    missing = []
    for site in iter_quantizers(target):
        if not site.quantizer.state_dict():
            continue
        donor = donors.get(site.name)
        if (
            donor is None
            or _rounds_product(donor) != _rounds_product(site)
            or not _copy_state(donor.quantizer, site.quantizer)
        ):
            missing.append(site.name)
            continue
        copied.append(site.name)
        if _rounds_product(site):
            _copy_product_offset(donor.owner, cast(QkrAttention, site.owner))
    return copied, missing


def _rounds_product(site: Site) -> bool:
    """True for QKR's `k_quantizer`, which rounds the product of matrix and input, not keys."""
    return isinstance(site.owner, QkrAttention) and site.quantizer is site.owner.k_quantizer


def _copy_product_offset(donor: nn.Module, target: QkrAttention) -> None:
    source_offset = getattr(donor, "product_offset", None)
    offset = target.product_offset
    if source_offset is not None and offset is not None and source_offset.shape == offset.shape:
        offset.data.copy_(source_offset)


def reset_attention_weights(net: nn.Module) -> list[str]:
    """Reinitialize the weights that OFQ's code loses when it converts a model.

    In each quantized attention, these are `proj`, `qkv` if there is no QKR, and the table of
    position biases, if any.

    Returns:
        Names of the linear layers and tables that were reset.
    """
    reset = []
    for name, module in net.named_modules():
        if not isinstance(module, QkrAttention | QuantAttention):
            continue
        for child in ("qkv", "proj"):
            layer = getattr(module, child, None)
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
                reset.append(f"{name}.{child}")
        table = getattr(module, _TABLE, None)
        if isinstance(table, nn.Parameter):
            nn.init.trunc_normal_(table, std=_TABLE_STD)
            reset.append(f"{name}.{_TABLE}")
    return reset


def add_random_biases(net: nn.Module) -> list[str]:
    """Add random biases to linear layers without a bias, except in modules called `attn`.

    OFQ's code does so, too.

    Returns:
        Names of the layers that got a bias.
    """
    names = [
        name
        for name, module in net.named_modules()
        if type(module) is nn.Linear and module.bias is None and ".attn." not in name
    ]
    add_biases(net, names)
    for name in names:
        linear: Any = net.get_submodule(name)
        bound = linear.in_features**-0.5  # as torch initializes biases
        nn.init.uniform_(linear.bias, -bound, bound)
    return names


def _copy_state(donor: Quantizer, target: Quantizer) -> bool:
    """Copy a quantizer's state with `_copy_affine`, or directly if spec and shapes are equal.

    Step sizes may be relative to their initial value in one quantizer, and absolute in the other.

    Returns:
        True if the state was copied.
    """
    if isinstance(donor, FrozenNonuniform):
        donor = donor.quantizer
    if not is_ready(donor):
        return False
    if _copy_affine(donor, target):
        return True
    if donor.spec != target.spec or donor.num_stored_scales != target.num_stored_scales:
        return False
    donor_state = donor.state_dict()
    target_state = target.state_dict()
    common_names = target_state.keys() & donor_state.keys()
    if any(donor_state[name].shape != target_state[name].shape for name in common_names):
        return False
    target.load_state_dict({name: donor_state[name] for name in common_names}, strict=False)
    for donor_module, target_module in zip(donor.modules(), target.modules(), strict=True):
        if not isinstance(target_module, LSQ):
            continue
        # A frozen quantizer stores each step size as an absolute one.
        is_donor_relative = getattr(donor_module, "change", None) is not None
        if is_donor_relative != (target_module.change is not None):
            step: Any = donor_module.scale
            target_module.set_scale(step.detach())
        if isinstance(target_module, AutoSignLSQ) and isinstance(donor_module, FrozenActivation):
            target_module.signed.fill_(float(donor_module.qmin < 0))
    return True


def _copy_affine(donor: Quantizer, target: Quantizer) -> bool:
    """Copy a symmetric affine grid into an LSQ quantizer. Returns False if that is impossible."""
    if not isinstance(donor, Affine) or type(target) is not LSQ:
        return False
    if donor.spec.bits != target.spec.bits or donor.spec.bias_correction:
        return False
    # Scales along another axis mean something else, even if their number is equal.
    has_same_layout = donor.axis == target.axis and donor.scale.shape == target.scale.shape
    if donor.axis is not None and not has_same_layout:
        return False
    if (donor.zero_point + target.spec.qmin != donor.qmin).any():
        return False
    target.set_scale(donor.scale.expand_as(target.scale))
    return True
