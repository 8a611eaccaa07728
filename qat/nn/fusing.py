"""Parameters of quantizers for fused Functions; None if a quantizer must run separately."""

from __future__ import annotations

from torch import nn

from qat.kernels import LSQParams
from qat.kernels.fused import WeightParams
from qat.nn.quant_module import QuantModule, is_watched
from qat.quantizers import Quantizer


def _params_of(quantizer: nn.Module) -> LSQParams | WeightParams | None:
    """Parameters of the quantizer for a Function; None if there are none, or if it is watched."""
    if not isinstance(quantizer, Quantizer) or is_watched(quantizer):
        return None
    if is_watched(getattr(quantizer, "quantizer", quantizer)):
        return None
    return quantizer.operand()


def operand_of(quantizer: nn.Module) -> LSQParams | None:
    """Parameters of an activation quantizer."""
    params = _params_of(quantizer)
    return params if isinstance(params, LSQParams) else None


def weight_params(module: QuantModule, role: str) -> WeightParams | None:
    """Quantizer parameters of the weight with this role, and the quantized weight if it is kept."""
    params = _params_of(getattr(module, f"{role}_quantizer"))
    if isinstance(params, LSQParams):
        if params.before is not None:
            return None
        params = WeightParams((params.codes, params.grad_factor), params.scale)
    if params is None:
        return None
    return params._replace(cached=module.kept_weight(role))


def is_off(module: nn.Module) -> bool:
    """True for a dropout or an identity that changes nothing and is not watched."""
    if not isinstance(module, nn.Dropout | nn.Identity) or is_watched(module):
        return False
    return not (module.training and getattr(module, "p", False))
