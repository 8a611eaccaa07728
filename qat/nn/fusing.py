"""Get the quantizer parameters that fused autograd Functions need.

The getters return None for a quantizer that cannot be fused.
"""

from __future__ import annotations

from torch import nn

from qat.kernels import LSQParams
from qat.kernels.fused import WeightParams
from qat.nn.quant_module import QuantModule, is_hooked
from qat.quantizers import Quantizer


def _fused_params_of(quantizer: nn.Module) -> LSQParams | WeightParams | None:
    """The quantizer's parameters for a fused Function.

    Returns None if the quantizer has no such parameters, or if hooks or a replaced `forward`
    observe the quantizer.
    """
    if not isinstance(quantizer, Quantizer) or is_hooked(quantizer):
        return None
    inner = getattr(quantizer, "quantizer", quantizer)  # a quantizer with offsets contains another
    if is_hooked(inner):
        return None
    return quantizer.fused_params()


def activation_params(quantizer: nn.Module) -> LSQParams | None:
    """Parameters of an activation quantizer. Returns None if the quantizer cannot be fused."""
    params = _fused_params_of(quantizer)
    return params if isinstance(params, LSQParams) else None


def weight_params(module: QuantModule, role: str) -> WeightParams | None:
    """Quantizer parameters of the weight with this role, with the cached quantized weight, if any.

    Returns None if the quantizer cannot be fused.
    """
    params = _fused_params_of(getattr(module, f"{role}_quantizer"))
    if isinstance(params, LSQParams):
        if params.before is not None:
            return None
        params = WeightParams((params.codes, params.grad_factor), params.scale)
    if params is None:
        return None
    return params._replace(cached=module.cached_weight(role))


def is_inactive(module: nn.Module) -> bool:
    """True for a dropout or an identity that changes nothing and is not hooked."""
    if not isinstance(module, nn.Dropout | nn.Identity) or is_hooked(module):
        return False
    return not (module.training and getattr(module, "p", False))
