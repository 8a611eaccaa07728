"""Carry weights and scales between nets of different recipes."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from qat.model.frozen import FrozenWeight
from qat.model.scales import is_ready
from qat.model.sites import iter_quantizers
from qat.nn import QkrAttention, QuantAttention
from qat.quantizers import LSQ, Affine, Quantizer
from qat.quantizers.shifted import Shifted

# Swin's biases, and the spread of their first values there and in the reference.
_TABLE, _TABLE_STD = "relative_position_bias_table", 0.02


def timm_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The float weights of a net under timm's names, whatever its recipe: quantizers dropped, QKR's factors stacked to `qkv`.

    A query bias that QKR dropped comes back as zeros, and so does the key bias, to which a softmax is blind. Of a frozen net
    (`qat.model.frozen.keeps_weights`) come the numbers that its codes stand for.
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
        own = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
        state |= {prefix + k: v.detach() for k, v in module.state_dict().items() if k in own}
        if isinstance(codes := getattr(module, "weight_quantizer", None), FrozenWeight):
            state[f"{prefix}weight"] = codes()
    for name, child in module._modules.items():  # timm's state has a layer under each of its names
        if child is not None and name not in consumed:
            _collect(child, f"{prefix}{name}.", state)


def copy_scales(source: nn.Module, target: nn.Module) -> tuple[list[str], list[str]]:
    """Copy scales and offsets where quantizer, bits and shapes agree, and the scales are there.

    Steps that are learned also take an affine grid of as many codes: its zero point moves into offsets, or has to be none.

    Args:
        source: a quantized net.
        target: a converted net.

    Returns:
        Names of the sites that were copied, and of those that were not and need data.
    """
    have = {site.name: site for site in iter_quantizers(source)}
    copied, missing = [], []
    for site in iter_quantizers(target):
        state = site.quantizer.state_dict()
        if not state:
            continue
        donor = have.get(site.name)
        if donor is None or not is_ready(donor.quantizer):
            missing.append(site.name)
            continue
        if _takes_affine(donor.quantizer, site.quantizer):
            copied.append(site.name)
            continue
        given = _stored_alike(donor.quantizer, state.keys())
        if donor.quantizer.spec != site.quantizer.spec or {k: v.shape for k, v in given.items()} != {k: v.shape for k, v in state.items()}:
            missing.append(site.name)
            continue
        site.quantizer.load_state_dict(given)
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
        lost = {child for child, layer in module.named_children() if child in {"qkv", "proj"} and isinstance(layer, nn.Linear)}
        for child in sorted(lost, reverse=True):
            module.get_submodule(child).reset_parameters()  # type: ignore[operator]
            reset.append(f"{name}.{child}")
        table = getattr(module, _TABLE, None)
        if isinstance(table, nn.Parameter):
            nn.init.trunc_normal_(table, std=_TABLE_STD)
            reset.append(f"{name}.{_TABLE}")
    return reset


def _stored_alike(quantizer: Quantizer, names: AbstractSet[str]) -> dict[str, Tensor]:
    """The state of a quantizer under other names: a step as itself or as its start and what is learned of it."""
    state: dict[str, Tensor] = quantizer.state_dict()
    for name in names - state.keys():
        prefix, _, kind = name.rpartition("scale")
        if kind == "" and f"{prefix}start" in state:
            del state[f"{prefix}start"], state[f"{prefix}change"]
            state[name] = quantizer.get_submodule(prefix.removesuffix(".")).scale.detach()  # type: ignore[operator]
        prefix, _, kind = name.rpartition("start")
        if kind == "" and f"{prefix}scale" in state:
            step = state.pop(f"{prefix}scale")
            state |= {name: step, f"{prefix}change": torch.zeros_like(step)}
    return state


@torch.no_grad()
def _takes_affine(donor: Quantizer, target: Quantizer) -> bool:
    """Give LSQ, offsets around it included, the grid of post-training quantization; False where it cannot have it."""
    lsq = target.quantizer if isinstance(target, Shifted) else target
    if not (isinstance(donor, Affine) and type(lsq) is LSQ and donor.spec.bits == lsq.spec.bits) or donor.spec.bias_correction:
        return False
    # As many steps along another axis would be others.
    if not (donor.axis is None or (donor.axis == lsq.axis and donor.scale.shape == lsq.scale.shape)):
        return False
    shift = (donor.zero_point + lsq.spec.qmin - donor.qmin) * donor.scale
    is_shifted = isinstance(target, Shifted) and donor.axis is None
    if bool(shift.any()) and not is_shifted:
        return False
    lsq.set_scale(donor.scale.expand_as(lsq.scale))
    if isinstance(target, Shifted) and is_shifted:
        target.offset_before.copy_(shift.expand_as(target.offset_before))
        if target.offset_after is not None:
            target.offset_after.copy_(-target.offset_before)
    return True
