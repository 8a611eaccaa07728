"""Whether a module may run as a fused Function just now, and what that Function has to be given."""

from __future__ import annotations

from torch import nn

from qat.kernels.fused import LSQParams, WeightParams
from qat.nn.quant_module import QuantModule, is_watched
from qat.quantizers import LSQ, SEQ, Shifted, StatsQ


def operand_of(quantizer: nn.Module) -> LSQParams | None:
    """An LSQ quantizer with its parameters, with or without offsets over the last dimension; None for all others, and watched ones."""
    before = after = None
    if type(quantizer) is Shifted and not is_watched(quantizer) and quantizer.spec.offset_ndim == 1:
        before, after, quantizer = quantizer.offset_before, quantizer.offset_after, quantizer.quantizer
    if not isinstance(quantizer, LSQ) or type(quantizer) not in {LSQ, SEQ} or is_watched(quantizer):
        return None
    scale = quantizer.scale
    if scale is None:
        return None
    return LSQParams(scale, before, after, quantizer.code_range, quantizer.grad_factor)


def weight_params(module: QuantModule, role: str) -> WeightParams | None:
    """StatsQ or LSQ of the weight with this role; None for all other quantizers, and for one that is watched."""
    quantizer = getattr(module, f"{role}_quantizer")
    if type(quantizer) is StatsQ and not is_watched(quantizer):
        return WeightParams(quantizer.spec.bits, None, module.ready(role))
    lsq = operand_of(quantizer)
    return None if lsq is None or lsq.before is not None else WeightParams(lsq.settings, lsq.scale, module.ready(role))


def is_off(dropout: nn.Module) -> bool:
    """True for a dropout that lets everything through."""
    return not dropout.training or isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0.0
