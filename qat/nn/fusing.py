"""Whether a module may run as a fused Function just now, and what that Function has to be given."""

from __future__ import annotations

from torch import nn

from qat.kernels import LSQParams
from qat.kernels.fused import WeightParams
from qat.nn.quant_module import QuantModule, is_watched
from qat.quantizers import Quantizer


def _found(quantizer: nn.Module) -> LSQParams | WeightParams | None:
    """What a quantizer gives to the Function; None where it gives nothing, or somebody watches it."""
    inner = getattr(quantizer, "quantizer", quantizer)
    return (
        quantizer.operand()
        if isinstance(quantizer, Quantizer) and not (is_watched(quantizer) or is_watched(inner))
        else None
    )


def operand_of(quantizer: nn.Module) -> LSQParams | None:
    """A quantizer of an input, with its parameters."""
    found = _found(quantizer)
    return found if isinstance(found, LSQParams) else None


def weight_params(module: QuantModule, role: str) -> WeightParams | None:
    """The quantizer of the weight with this role."""
    found = _found(getattr(module, f"{role}_quantizer"))
    if isinstance(found, LSQParams):
        found = WeightParams(found[4:], found.scale) if found.before is None else None
    return None if found is None else found._replace(cached=module.ready(role))


def is_off(module: nn.Module) -> bool:
    """True for a dropout or an identity that lets everything through, and that nobody watches."""
    return (
        isinstance(module, nn.Dropout | nn.Identity)
        and not (module.training and getattr(module, "p", False))
        and not is_watched(module)
    )
