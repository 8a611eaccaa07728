"""Nets that other quantization libraries make of a float timm net, for the comparison in accuracy.

Weights and inputs of the Linears at `bits`, of the first and the last layer at 8 as in qat's own recipes, as far as the library can. Of
what it offers, the configuration that suits a trained net at few bits: learned steps where it has them, begun at values that fit so few
levels. None of them quantizes what an attention does between its Linears. The libraries are imported only if asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.nn.utils import parametrize

from qat.utils.probing import probing

ENDS_BITS = 8
CANDIDATES = 40


def brevitas(net: nn.Module, batches: Sequence[Tensor], bits: int) -> nn.Module:
    """Learned steps of weights and activations and learned zero points of these, all begun where they lose least; 4 levels at 2 bits."""
    from brevitas import nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloatMSE, ShiftedUint8ActPerTensorFloatMSE

    def layer(made: type, width: int) -> tuple[type, dict[str, Any]]:
        # Its weights are in a narrow range unless set otherwise: three levels at 2 bits.
        weights = {
            "weight_quant": Int8WeightPerChannelFloatMSE,
            "weight_bit_width": width,
            "weight_narrow_range": False,
        }
        # It looks at ranges in so many batches and learns from then on.
        inputs = {
            "input_quant": ShiftedUint8ActPerTensorFloatMSE,
            "input_bit_width": width,
            "input_collect_stats_steps": len(batches),
        }
        return made, {**weights, **inputs, "return_quant_tensor": False}

    net = layerwise_quantize(
        net,
        {nn.Linear: layer(qnn.QuantLinear, bits)},
        name_blacklist=[net.pretrained_cfg["classifier"]],
    )  # type: ignore[index]
    ends = {
        nn.Linear: layer(qnn.QuantLinear, ENDS_BITS),
        nn.Conv2d: layer(qnn.QuantConv2d, ENDS_BITS),
    }
    net = layerwise_quantize(net, ends).train()
    with torch.no_grad():
        for images in (*batches, batches[0]):
            net(images)
    return net


def torchao(net: nn.Module, batches: Sequence[Tensor], bits: int) -> nn.Module:
    """Learned steps of weights (a prototype), begun at their range; ranges of activations of each token anew: it cannot learn them."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import (
        IntxFakeQuantizeConfig,
        QATConfig,
        initialize_fake_quantizers,
    )

    last = net.pretrained_cfg["classifier"]  # type: ignore[index]
    for width, is_last in ((bits, False), (ENDS_BITS, True)):
        dtype = getattr(torch, f"int{width}")
        inputs = IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=False)
        weights = IntxFakeQuantizeConfig(
            dtype, "per_channel", is_symmetric=True, is_dynamic=False, range_learning=True
        )
        quantize_(
            net,
            QATConfig(activation_config=inputs, weight_config=weights, step="prepare"),
            filter_fn=lambda module, name, is_last=is_last: (
                type(module) is nn.Linear and (name == last) == is_last
            ),
        )
    with torch.no_grad():
        initialize_fake_quantizers(net, (batches[0],))
    return net


def torch_ao(net: nn.Module, batches: Sequence[Tensor], bits: int) -> nn.Module:
    """Learned steps, and learned zero points of activations, begun where they lose least."""
    ends = {net.pretrained_cfg[name] for name in ("classifier", "first_conv")}  # type: ignore[index]
    widths = {
        module: ENDS_BITS if name in ends else bits
        for name, module in net.named_modules()
        if type(module) in {nn.Linear, nn.Conv2d}
    }
    found: dict[nn.Module, nn.Module] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[module] = _learnable_input(args[0], widths[module])

    with probing(net, [module.register_forward_pre_hook(look) for module in widths]):
        net(torch.cat(list(batches)))
    for module, quantizer in found.items():
        module.input_quantizer = quantizer
        module.register_forward_pre_hook(lambda module, args: (module.input_quantizer(args[0]),))
        parametrize.register_parametrization(
            module, "weight", _learnable_weight(module.weight, widths[module])
        )
    return net


def _learnable_weight(weight: Tensor, bits: int) -> nn.Module:
    """A step a channel, symmetric."""
    rows, qmin, qmax = weight.detach().flatten(1), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    kind = {
        "dtype": torch.qint8,
        "qscheme": torch.per_channel_symmetric,
        "ch_axis": 0,
        "channel_len": len(weight),
    }
    made = _LearnableFakeQuantize(
        MovingAveragePerChannelMinMaxObserver, qmin, qmax, use_grad_scaling=True, **kind
    )
    highest = rows.abs().amax(1)
    return _begun(made, rows, -highest, highest * qmax / -qmin)


def _learnable_input(x: Tensor, bits: int) -> nn.Module:
    """One step and one zero point."""
    kind = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine}
    made = _LearnableFakeQuantize(
        MovingAverageMinMaxObserver, 0, 2**bits - 1, use_grad_scaling=True, **kind
    )
    rows = x.reshape(1, -1)
    return _begun(made, rows, rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0))


def _begun(quantizer: _LearnableFakeQuantize, rows: Tensor, low: Tensor, high: Tensor) -> nn.Module:
    scale, zero_point = fitting(rows, low, high, quantizer.quant_min, quantizer.quant_max)
    quantizer.scale.data.copy_(scale)
    quantizer.zero_point.data.copy_(zero_point)
    quantizer.enable_param_learning()
    # Its observer is not asked any more; ranges that have seen nothing are infinite, which a look for faults takes for one.
    quantizer.activation_post_process = nn.Identity()
    return quantizer


def fitting(rows: Tensor, low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Of ranges that are parts of a whole one, the one with the least squared error.

    Args:
        rows: (rows, n).
        low: lower end of the whole range of each row, (rows,).
        high: upper end.
        qmin: code of the lower end.
        qmax: code of the upper end.

    Returns:
        Step size, above 0, and zero point, a whole number: (rows,) each.
    """
    found = []
    for part in torch.arange(1, CANDIDATES + 1, device=rows.device) / CANDIDATES:
        step = ((high - low) * part / (qmax - qmin)).clamp(min=torch.finfo(rows.dtype).eps)
        zero = qmin - (low * part / step).round()
        codes = (rows / step[:, None] + zero[:, None]).round().clamp(qmin, qmax)
        found.append(
            torch.stack([
                ((codes - zero[:, None]) * step[:, None] - rows).square().mean(1),
                step,
                zero,
            ])
        )
    errors, steps, zeros = torch.stack(found, 1)
    best = errors.argmin(0)[None]
    return steps.gather(0, best)[0], zeros.gather(0, best)[0]


# The package whose version counts, and the function.
PEERS = {
    "brevitas": ("brevitas", brevitas),
    "torchao": ("torchao", torchao),
    "torch_ao": ("torch", torch_ao),
}


def quantized(library: str, net: nn.Module, batches: Sequence[Tensor], bits: int) -> nn.Module:
    """The net of a library, in training mode, its steps filled.

    Args:
        library: a key of `PEERS`.
        net: float, of timm; used up.
        batches: images for the first steps, (B, C, H, W) each.
        bits: of weights and activations.

    Returns:
        A net whose quantizers' parameters have no weight decay in `qat.lit.optim.parameter_groups`, as qat's own have none: some are no
        vectors, by which it would know them.
    """
    weights = set(net.parameters())
    net = PEERS[library][1](net, batches, bits)
    spared = set(net.no_weight_decay()) if hasattr(net, "no_weight_decay") else set()  # type: ignore[operator]
    spared |= {name for name, one in net.named_parameters() if one not in weights}
    net.no_weight_decay = lambda: spared  # type: ignore[assignment]
    return net.train()
