"""Nets that other quantization libraries make of a float one, W4 A4 in all `nn.Linear` where they can; imported only if asked for.

Used by `make peers`. Each function changes the net in place or gives another one; images are for calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.nn import functional as F

QMIN, QMAX = -8, 7  # four bits with a sign


class FakeQuantLinear(nn.Linear):
    """A Linear with torch.ao's fake quantization of its input and of its weight.

    Args:
        linear: whose parameters are taken over.
        input_quantizer: of x (..., in).
        weight_quantizer: of W (out, in).
    """

    def __init__(self, linear: nn.Linear, input_quantizer: nn.Module, weight_quantizer: nn.Module) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.input_quantizer, self.weight_quantizer = input_quantizer, weight_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


def _replace_linears(net: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(net.named_modules()):
        if type(module) is nn.Linear:
            net.set_submodule(name, make(module))
    return net


def _observed(observer: type, **kwargs: Any) -> dict[str, Any]:
    scheme = torch.per_channel_symmetric if "ch_axis" in kwargs else torch.per_tensor_symmetric
    return {"observer": observer, "quant_min": QMIN, "quant_max": QMAX, "dtype": torch.qint8, "qscheme": scheme, **kwargs}


def torch_ao_fused(net: nn.Module, images: Tensor) -> nn.Module:
    """Moving minimum and maximum, observed and applied by one C++ operation; weights per channel, activations per tensor."""

    def make(linear: nn.Linear) -> nn.Module:
        act = FusedMovingAvgObsFakeQuantize(**_observed(MovingAverageMinMaxObserver))
        return FakeQuantLinear(linear, act, FusedMovingAvgObsFakeQuantize(**_observed(MovingAveragePerChannelMinMaxObserver, ch_axis=0)))

    return _replace_linears(net, make)


def torch_ao_learnable(net: nn.Module, images: Tensor) -> nn.Module:
    """LSQ in C++; weights per channel, activations per tensor, steps from one observed batch."""

    def make(linear: nn.Linear) -> nn.Module:
        act = _LearnableFakeQuantize(**_observed(MovingAverageMinMaxObserver), use_grad_scaling=True)
        channels = {"ch_axis": 0, "channel_len": linear.out_features}
        weight = _LearnableFakeQuantize(**_observed(MovingAveragePerChannelMinMaxObserver, **channels), use_grad_scaling=True)
        return FakeQuantLinear(linear, act, weight)

    net = _replace_linears(net, make)
    with torch.no_grad():
        net(images)
    for module in net.modules():
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_param_learning()
    return net


def prepare_torchao(
    net: nn.Module,
    activations: Any,
    dtype: Any = torch.int4,  # type: ignore[attr-defined]
    only: Any = None,
    **weights: Any,
) -> nn.Module:
    """`quantize_(..., step="prepare")` with weights per channel, symmetric.

    Args:
        net: changed in place.
        activations: config of the inputs, None = float.
        dtype: of the weights.
        only: chooses the layers by (module, name); None = all `nn.Linear`.
        weights: further settings of the weights.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weight = IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True, **weights)
    config = QATConfig(activation_config=activations, weight_config=weight, step="prepare")
    quantize_(net, config, **({} if only is None else {"filter_fn": only}))
    return net


def torchao_weights(net: nn.Module, images: Tensor) -> nn.Module:
    """Weights alone, per channel, scales from the weights of the step."""
    return prepare_torchao(net, None)


def torchao_both(net: nn.Module, images: Tensor) -> nn.Module:
    """Activations as well, per token, asymmetric, scales from the step."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig

    return prepare_torchao(net, IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False))  # type: ignore[attr-defined]


def torchao_learned(net: nn.Module, images: Tensor) -> nn.Module:
    """Learned ranges of weights (a prototype); activations of 8 bits per token, whose ranges it cannot learn."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, initialize_fake_quantizers

    net = prepare_torchao(net, IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False), is_dynamic=False, range_learning=True)
    initialize_fake_quantizers(net, (images,))
    return net


def brevitas(net: nn.Module, images: Tensor) -> nn.Module:
    """`layerwise_quantize`: weights per channel, activations per tensor with a learned step."""
    from brevitas import nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    weights = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": 4}
    # It looks at ranges for 300 batches, at a cost, and learns from then on; here for one.
    inputs = {"input_quant": Int8ActPerTensorFloat, "input_bit_width": 4, "input_collect_stats_steps": 1}
    net = layerwise_quantize(net, {nn.Linear: (qnn.QuantLinear, {**weights, **inputs, "return_quant_tensor": False})}).train()
    for _ in range(2):
        net(images)
    return net


def modelopt(net: nn.Module, images: Tensor) -> nn.Module:
    """`mtq.quantize`: weights per channel, activations per tensor, ranges from calibration; gradients pass as they are."""
    import modelopt.torch.quantization as mtq

    rules: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}, "enable": True},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 4, "axis": None}, "enable": True},
        {"quantizer_name": "*patch_embed*", "enable": False},
    ]
    return mtq.quantize(net, {"quant_cfg": rules, "algorithm": "max"}, lambda one: one(images))


# Row of the table, what of the Linears is quantized, how.
PEERS: dict[str, tuple[str, Callable[[nn.Module, Tensor], nn.Module]]] = {
    "torch.ao fused observer": ("W4 per channel, A4 per tensor, moving min-max", torch_ao_fused),
    "torch.ao learnable (LSQ)": ("W4 per channel, A4 per tensor, learned", torch_ao_learnable),
    "torchao, weights alone": ("W4 per channel, from the step", torchao_weights),
    "torchao": ("W4 per channel, A4 per token, from the step", torchao_both),
    "torchao, learned ranges": ("W4 per channel, learned; A8 per token, from the step", torchao_learned),
    "brevitas": ("W4 per channel, from the step; A4 per tensor, learned", brevitas),
    "modelopt": ("W4 per channel, A4 per tensor, calibrated", modelopt),
}
