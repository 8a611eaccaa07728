"""Carry weights and scales between nets of different recipes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qat.model.foreign_weights import grow_biases
from qat.model.frozen import FrozenWeight
from qat.model.scales import is_ready
from qat.model.sites import iter_quantizers
from qat.nn import QkrAttention, QuantAttention
from qat.quantizers import LSQ, Affine, Quantizer

# Swin's biases, and the spread of their first values there and in the reference.
_TABLE, _TABLE_STD = "relative_position_bias_table", 0.02


def timm_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The float weights of a net under timm's names, whatever its recipe: quantizers dropped, QKR's factors stacked to `qkv`.

    A query bias that QKR dropped comes back as zeros, and so does the key bias, to which a softmax is blind. Of a frozen net
    (`qat.model.freeze.keeps_weights`) come the numbers that its codes stand for.
    """
    state: dict[str, Tensor] = {}
    _collect(net, "", state)
    return state


def _collect(module: nn.Module, prefix: str, state: dict[str, Tensor]) -> None:
    if isinstance(module, Quantizer):
        return
    consumed: set[str] = set()
    if isinstance(module, QkrAttention):
        state |= {prefix + name: tensor for name, tensor in module.timm_weights().items()}
        consumed = {"v"}
    else:
        own = module._parameters.keys() | module._buffers.keys()
        state |= {prefix + k: v.detach() for k, v in module.state_dict().items() if k in own}
        if isinstance(codes := getattr(module, "weight_quantizer", None), FrozenWeight):
            state[f"{prefix}weight"] = codes()
    for name, child in module._modules.items():  # timm's state has a layer under each of its names
        if child is not None and name not in consumed:
            _collect(child, f"{prefix}{name}.", state)


def copy_scales(source: nn.Module, target: nn.Module) -> tuple[list[str], list[str]]:
    """Copy scales and offsets where quantizer, bits and shapes agree, and the scales are there.

    Steps that are learned without offsets also take a symmetric affine grid of as many codes.

    Args:
        source: a quantized net.
        target: a converted net.

    Returns:
        Names of the sites that were copied, and of those that were not and need data.
    """
    have = {site.name: site for site in iter_quantizers(source)}
    copied, missing = [], []
    for site in iter_quantizers(target):
        if not site.quantizer.state_dict():
            continue
        donor = have.get(site.name)
        if donor is None or not _copy_state(donor.quantizer, site.quantizer):
            missing.append(site.name)
            continue
        copied.append(site.name)
        if isinstance(site.owner, QkrAttention) and site.quantizer is site.owner.k_quantizer:
            theirs, own = getattr(donor.owner, "product_offset", None), site.owner.product_offset
            if theirs is not None and own is not None and theirs.shape == own.shape:
                own.data.copy_(theirs)
    return copied, missing


def forget_attention_weights(net: nn.Module) -> list[str]:
    """Draw anew what the reference's conversion loses: `proj` of every attention, `qkv` where there is no QKR, Swin's table of biases.

    Returns:
        Names of the Linears and tables that were reset.
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


def invent_biases(net: nn.Module) -> list[str]:
    """Give Linears outside of attentions that have no bias one, at first as random as torch makes it: so does the reference's conversion.

    Returns:
        Their names.
    """
    names = [
        name
        for name, module in net.named_modules()
        if type(module) is nn.Linear and module.bias is None and ".attn." not in name
    ]
    grow_biases(net, names)
    for name in names:
        linear: Any = net.get_submodule(name)
        nn.init.uniform_(linear.bias, -(linear.in_features**-0.5), linear.in_features**-0.5)
    return names


def _copy_state(donor: Quantizer, target: Quantizer) -> bool:
    """Give a quantizer the state of one of its spec and shapes, whether steps are relative or absolute there; False where it differs."""
    if not is_ready(donor):
        return False
    if _copy_affine(donor, target):
        return True
    if donor.spec != target.spec or donor.n_scales != target.n_scales:
        return False
    given, state = donor.state_dict(), target.state_dict()
    shared = state.keys() & given.keys()
    if any(given[name].shape != state[name].shape for name in shared):
        return False
    target.load_state_dict({name: given[name] for name in shared}, strict=False)
    for a, b in zip(donor.modules(), target.modules(), strict=True):
        if isinstance(a, LSQ) and isinstance(b, LSQ) and (a.change is None) != (b.change is None):
            b.set_scale(a.scale.detach())
    return True


def _copy_affine(donor: Quantizer, target: Quantizer) -> bool:
    """Give LSQ the symmetric grid of post-training quantization; False where it cannot have it."""
    if (
        not (
            isinstance(donor, Affine)
            and type(target) is LSQ
            and donor.spec.bits == target.spec.bits
        )
        or donor.spec.bias_correction
    ):
        return False
    # As many steps along another axis would be others.
    fits = donor.axis is None or (
        donor.axis == target.axis and donor.scale.shape == target.scale.shape
    )
    if not fits or bool((donor.zero_point + target.spec.qmin != donor.qmin).any()):
        return False
    target.set_scale(donor.scale.expand_as(target.scale))
    return True
