"""From a trained net to the form in which it is deployed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.convert import conversion_of
from qat.model.frozen.forms import frozen_form
from qat.model.frozen.quantizers import MODES, OFFSETS, Frozen, FrozenActivation, FrozenWeight, set_mode
from qat.model.scales import assert_ready
from qat.model.sites import iter_quantizers
from qat.nn import FqNet, QkrAttention
from qat.nn.linear import QuantLinear
from qat.nn.quant_module import QuantModule
from qat.nn.swin import QuantWindowAttention
from qat.nn.vit import QuantVitAttention
from qat.utils.validate import check_choice

# Attentions that hand what leaves `qkv` to the quantizers as it is.
DIRECT = (QuantVitAttention, QuantWindowAttention)


def freeze(net: nn.Module, *, mode: str = "float") -> nn.Module:
    """A copy of a quantized net with integer codes in place of its float weights, and nothing left to learn.

    Weights are codes with a scale a row: StatsQ's code k stands for (k + 1/2) * step. Query-key reparameterization keeps the codes of its
    folded matrix alone. An offset behind the input of a Linear becomes part of its bias (W c), as does one in front of values, and of
    queries and keys that no norm or rotation changes; other offsets stay in front of their quantizer, and those that are zero go.

    Args:
        net: converted, with all scales set; stays as it is.
        mode: `float` computes products on the numbers that codes stand for, `integer` on the codes (see `integer_forward`).

    Returns:
        The frozen net, in evaluation mode. Its quantizers are found by `qat.iter_quantizers`, of which `codes()` gives those of a weight.

    Raises:
        UsageError: the net is in float or frozen already, a scale was never set, or a quantizer has no fixed grid.
    """
    check_choice("mode", mode, MODES)
    if conversion_of(net) is None:
        raise UsageError("freeze: the net is in float; convert and train it first, or load a quantized checkpoint")
    if is_frozen(net):
        raise UsageError("freeze: the net is frozen already")
    assert_ready(net)
    return set_mode(drop_dead_offsets(freeze_structure(copy.deepcopy(net).float())), mode)


def is_frozen(net: nn.Module) -> bool:
    """True for what `freeze` gives."""
    return any(isinstance(module, Frozen) for module in net.modules())


def keeps_weights(net: nn.Module) -> bool:
    """False if freezing moved offsets into biases, or folded queries and keys: the float net cannot be told from what is left."""
    offsets = any(getattr(quantizer, name) is not None for quantizer in _activations(net) for name in OFFSETS)
    return not offsets and not (is_frozen(net) and any(isinstance(module, QkrAttention) for module in net.modules()))


@torch.no_grad()
def freeze_structure(net: nn.Module) -> nn.Module:
    """Replace in place, whatever the scales hold: what a file of codes is read into."""
    net.eval().requires_grad_(requires_grad=False)
    for site in list(iter_quantizers(net)):
        made = frozen_form(site)
        setattr(site.owner, site.name.rpartition(".")[2], made)
    for module in net.modules():
        if isinstance(module, QuantModule):
            _drop_masters(module)
    for module in net.modules():
        _fold_offsets(module)
    if isinstance(net, FqNet):
        net.connect()
    return net


def _drop_masters(module: QuantModule) -> None:
    if isinstance(module, QkrAttention):
        if isinstance(module.qk_quantizer, FrozenWeight):
            module.fold_bias()
            for name in ("q_weight", "k_weight", "q_bias"):
                setattr(module, name, None)
    elif isinstance(module.weight_quantizer, FrozenWeight):
        # Empty, not absent: nets of timm ask a layer's weight where it is and of which kind.
        empty = module.latent("weight").new_empty(0)
        del module.weight
        module.register_buffer("weight", empty, persistent=False)


def _fold_offsets(module: nn.Module) -> None:
    if isinstance(module, QuantLinear) and isinstance(module.input_quantizer, FrozenActivation):
        behind = module.input_quantizer.after
        if behind is not None and behind.shape == (module.in_features,):
            _add_to_bias(module, slice(None), module.quantized("weight").float() @ behind)
            module.input_quantizer.after = None
    if isinstance(module, QkrAttention) and isinstance(module.v, QuantLinear):
        _fold_before(module.v_quantizer, module.v, slice(None))
    if type(module) in DIRECT and isinstance(module.qkv, QuantLinear):
        quantizers: list[object] = [module.v_quantizer]
        if isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity):
            quantizers = [module.q_quantizer, module.k_quantizer, module.v_quantizer]
        size = module.qkv.out_features // 3
        for i, quantizer in zip(range(3 - len(quantizers), 3), quantizers, strict=True):
            _fold_before(quantizer, module.qkv, slice(i * size, (i + 1) * size))


def _fold_before(quantizer: object, linear: QuantLinear, rows: slice) -> None:
    if isinstance(quantizer, FrozenActivation) and quantizer.before is not None:
        _add_to_bias(linear, rows, quantizer.before)
        quantizer.before = None


def _add_to_bias(linear: QuantLinear, rows: slice, what: Tensor) -> None:
    bias = torch.zeros(linear.out_features, device=what.device) if linear.bias is None else linear.bias.detach().float().clone()
    bias[rows] += what
    linear.bias = nn.Parameter(bias, requires_grad=False)


def drop_dead_offsets(net: nn.Module) -> nn.Module:
    """Let go of offsets that are zero throughout."""
    for quantizer in _activations(net):
        for name in OFFSETS:
            offset = getattr(quantizer, name)
            if offset is not None and not offset.any():
                setattr(quantizer, name, None)
    return net


def prune_offsets(net: nn.Module, state: Collection[str]) -> None:
    """Let go of offsets that a file does not have: they were zero when it was written."""
    offsets = ((name, module, kind) for name, module in net.named_modules() if isinstance(module, FrozenActivation) for kind in OFFSETS)
    for name, module, kind in offsets:
        if f"{name}.{kind}" not in state:
            setattr(module, kind, None)


def _activations(net: nn.Module) -> Iterator[FrozenActivation]:
    return (module for module in net.modules() if isinstance(module, FrozenActivation))


def integer_forward(net: nn.Module, x: Tensor) -> Any:
    """What a quantized net makes of images, every product of quantized tensors computed on integer codes with int32 sums.

    Scales are applied to the sums. Norms, softmax, activation functions and residual sums stay in float, as do products that have an
    unquantized factor.

    Args:
        net: quantized, frozen or not; stays as it is.
        x: (B, C, H, W).

    Returns:
        What the net gives, logits or maps, equal to that of the frozen net in float to float rounding, but where that moves a value over
        a threshold.

    Raises:
        UsageError: see `freeze`; or something has no form on codes that fits int32.
    """
    net = net if is_frozen(net) else freeze(net)
    modes = {module: module.mode for module in net.modules() if isinstance(module, Frozen)}
    try:
        set_mode(net, "integer")
        with torch.no_grad():
            return net(x)
    finally:
        for module, mode in modes.items():
            module.mode = mode
