"""Models quantized with other libraries, for the comparison of accuracy.

Weights and inputs of linear layers have `bits`, and 8 bits in the first and the last layer, as in
qat's own recipes, if the library supports it. Each library has the configuration that suits a
trained model at few bits: learned step sizes if the library has them, with initial values for few
levels. No library quantizes the matrix products of attention. A library is imported only when it is
used.
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
    """Brevitas: learned step sizes, and learned zero points of activations; 4 levels at 2 bits.

    The initial values minimize the squared error.
    """
    from brevitas import nn as qnn
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloatMSE, ShiftedUint8ActPerTensorFloatMSE

    def layer(cls: type, width: int) -> tuple[type, dict[str, Any]]:
        # By default, weights have a narrow range: three levels at 2 bits.
        weights = {
            "weight_quant": Int8WeightPerChannelFloatMSE,
            "weight_bit_width": width,
            "weight_narrow_range": False,
        }
        # Ranges are observed for this many batches, then learned.
        inputs = {
            "input_quant": ShiftedUint8ActPerTensorFloatMSE,
            "input_bit_width": width,
            "input_collect_stats_steps": len(batches),
        }
        return cls, {**weights, **inputs, "return_quant_tensor": False}

    config: Any = net.pretrained_cfg
    linears = {nn.Linear: layer(qnn.QuantLinear, bits)}
    net = layerwise_quantize(net, linears, name_blacklist=[config["classifier"]])
    ends = {
        nn.Linear: layer(qnn.QuantLinear, ENDS_BITS),
        nn.Conv2d: layer(qnn.QuantConv2d, ENDS_BITS),
    }
    net = layerwise_quantize(net, ends).train()
    with torch.no_grad():
        # The last pass turns the observed ranges into parameters.
        for images in (*batches, batches[0]):
            net(images)
    return net


def torchao(net: nn.Module, batches: Sequence[Tensor], bits: int) -> nn.Module:
    """torchao: learned step sizes of weights (a prototype), with their range as initial value.

    Activations have a new range for each token, since torchao cannot learn their range.
    """
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
        config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
        quantize_(
            net,
            config,
            filter_fn=lambda module, name, is_last=is_last: (
                type(module) is nn.Linear and (name == last) == is_last
            ),
        )
    with torch.no_grad():
        initialize_fake_quantizers(net, (batches[0],))
    return net


def torch_ao(net: nn.Module, batches: Sequence[Tensor], bits: int) -> nn.Module:
    """PyTorch: learned step sizes, and learned zero points of activations.

    The initial values minimize the squared error.
    """
    learn_inputs(net, batches, bits)
    for module, width in weight_widths(net, bits).items():
        weight: Any = module.weight
        parametrize.register_parametrization(module, "weight", _learnable_weight(weight, width))
    return net


def parq(net: nn.Module, batches: Sequence[Tensor], bits: int) -> nn.Module:
    """PARQ of torchao: the optimizer quantizes the weights, see `evidence.peers.parq`.

    PARQ has no quantizers of activations: those are PyTorch's, as in `torch_ao`.
    """
    learn_inputs(net, batches, bits)
    return net


def weight_widths(net: nn.Module, bits: int) -> dict[nn.Module, int]:
    """Width of each linear layer and convolution: `bits`, or 8 in the first and the last layer."""
    config: Any = net.pretrained_cfg
    ends = {config["classifier"], config["first_conv"]}
    return {
        module: ENDS_BITS if name in ends else bits
        for name, module in net.named_modules()
        if type(module) in {nn.Linear, nn.Conv2d}
    }


def learn_inputs(net: nn.Module, batches: Sequence[Tensor], bits: int) -> None:
    """Quantize the inputs of all layers, with learned step sizes and zero points of PyTorch."""
    widths = weight_widths(net, bits)
    quantizers: dict[nn.Module, nn.Module] = {}

    def fit(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        quantizers[module] = _learnable_input(args[0], widths[module])

    with probing(net, [module.register_forward_pre_hook(fit) for module in widths]):
        net(torch.cat(list(batches)))
    for module, quantizer in quantizers.items():
        module.input_quantizer = quantizer
        module.register_forward_pre_hook(lambda module, args: (module.input_quantizer(args[0]),))


def _learnable_weight(weight: Tensor, bits: int) -> nn.Module:
    """A symmetric quantizer with a step size for each channel."""
    rows = weight.detach().flatten(1)
    qmin = -(2 ** (bits - 1))
    qmax = 2 ** (bits - 1) - 1
    quantizer = _LearnableFakeQuantize(
        MovingAveragePerChannelMinMaxObserver,
        qmin,
        qmax,
        use_grad_scaling=True,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        channel_len=len(weight),
    )
    highest = rows.abs().amax(1)
    return _initialized(quantizer, rows, -highest, highest * qmax / -qmin)


def _learnable_input(x: Tensor, bits: int) -> nn.Module:
    """An affine quantizer with one step size and one zero point."""
    quantizer = _LearnableFakeQuantize(
        MovingAverageMinMaxObserver,
        0,
        2**bits - 1,
        use_grad_scaling=True,
        dtype=torch.quint8,
        qscheme=torch.per_tensor_affine,
    )
    rows = x.reshape(1, -1)
    return _initialized(quantizer, rows, rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0))


def _initialized(
    quantizer: _LearnableFakeQuantize, rows: Tensor, low: Tensor, high: Tensor
) -> nn.Module:
    scale, zero_point = fitting(rows, low, high, quantizer.quant_min, quantizer.quant_max)
    quantizer.scale.data.copy_(scale)
    quantizer.zero_point.data.copy_(zero_point)
    quantizer.enable_param_learning()
    # The observer is not needed any more, and its infinite ranges would fail checks of values.
    quantizer.activation_post_process = nn.Identity()
    return quantizer


def fitting(rows: Tensor, low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Find the fraction of a range with the least squared error.

    Args:
        rows: (rows, n).
        low: lower end of the whole range of each row, (rows,).
        high: upper end of the whole range of each row, (rows,).
        qmin: code of the lower end.
        qmax: code of the upper end.

    Returns:
        Positive step sizes and integer zero points, (rows,) each.
    """
    candidates = []
    for part in torch.arange(1, CANDIDATES + 1, device=rows.device) / CANDIDATES:
        step = ((high - low) * part / (qmax - qmin)).clamp(min=torch.finfo(rows.dtype).eps)
        zero = qmin - (low * part / step).round()
        codes = (rows / step[:, None] + zero[:, None]).round().clamp(qmin, qmax)
        error = ((codes - zero[:, None]) * step[:, None] - rows).square().mean(1)
        candidates.append(torch.stack([error, step, zero]))
    errors, steps, zeros = torch.stack(candidates, 1)
    best = errors.argmin(0)[None]
    return steps.gather(0, best)[0], zeros.gather(0, best)[0]


# For each library, the package whose version is recorded, and the function that quantizes.
PEERS = {
    "brevitas": ("brevitas", brevitas),
    "torchao": ("torchao", torchao),
    "torch_ao": ("torch", torch_ao),
    "parq": ("torchao", parq),
    "parq_hard": ("torchao", parq),
}


def quantized(library: str, net: nn.Module, batches: Sequence[Tensor], bits: int) -> nn.Module:
    """Quantize a model with a library, and set initial step sizes.

    Args:
        library: a key of `PEERS`.
        net: float model of timm, which may be changed in place.
        batches: images for the initial step sizes, (B, C, H, W) each.
        bits: width of weights and activations.

    Returns:
        The model in training mode. Its quantizers' parameters have no weight decay in
        `qat.lit.optim.parameter_groups`, as in qat, although some are not vectors.
    """
    weights = set(net.parameters())
    net = PEERS[library][1](net, batches, bits)
    without_decay: set[str] = set()
    if hasattr(net, "no_weight_decay"):
        without_decay.update(net.no_weight_decay())  # type: ignore[operator]
    for name, parameter in net.named_parameters():
        if parameter not in weights:
            without_decay.add(name)
    net.no_weight_decay = lambda: without_decay  # type: ignore[assignment]
    return net.train()
