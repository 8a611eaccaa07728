"""A quantized net as a file of ExecuTorch, whose XNNPACK backend computes linear layers on integer codes: `export.py format=executorch`.

XNNPACK finds the step size of each row of inputs from its smallest and largest number. So each row gets two more numbers, the ends of the
quantizer's 8-bit range, for which the weights are zero: the step size it finds is the trained one, and the codes are the net's.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import UsageError
from qat.export.check import EXECUTORCH, Checked, compare, logits_of, open_session, quiet
from qat.export.codes import StoredWeight, store_weights
from qat.export.write import require_int8, unfused
from qat.model.frozen import FrozenActivation
from qat.nn.linear import QuantLinear

LOWEST, HIGHEST = -128, 127
# By which logits may differ, as a share of the largest one, or twice what float rounding of the images changes.
SHARE = 0.05


def write_pte(
    path: Path, frozen: nn.Module, net: nn.Module, images: Sequence[Tensor]
) -> tuple[Checked, dict[str, Any]]:
    """Write a file, run it beside its net.

    Args:
        path: the file.
        frozen: what is written.
        net: what it was frozen from, or itself.
        images: (B, C, H, W) each.

    Returns:
        How far both agree; what `to_pte` says of the file, and `logits_apart`, the largest difference as a share of the largest logit.

    Raises:
        UsageError: ExecuTorch cannot hold the net.
    """
    data, about = to_pte(frozen, images[0][:1])
    path.write_bytes(data)
    logits = functools.partial(logits_of, open_session(path, EXECUTORCH), batch=1)
    found = compare(net, logits, None, images)
    # Codes of a file cannot be read: images that differ by float rounding show how far values on thresholds move the logits of this net.
    allowed = max(SHARE, 2 * compare(net, lambda x: net(x * (1 + 1e-6)), None, images).apart)
    if not found.apart <= allowed:  # NaN, too
        found.problem = (
            f"logits differ by {found.apart:.1%} of the largest one; must be at most {allowed:.1%}"
        )
    return Checked({EXECUTORCH: found}), about | {"logits_apart": round(found.apart, 6)}


@quiet()
@torch.no_grad()
def to_pte(net: nn.Module, image: Tensor) -> tuple[bytes, dict[str, Any]]:
    """Write a net for one image at a time.

    Args:
        net: of `qat.freeze`, or float.
        image: (1, C, H, W), of the size that the net takes.

    Returns:
        The file, and lists of what is not on integers: `float_products`, layers whose inputs are rounded and multiplied as float numbers,
        and `outside_xnnpack`, how often each operator runs in ExecuTorch's own kernels.

    Raises:
        UsageError: a quantizer is none that XNNPACK can hold, or torch or ExecuTorch cannot export the net.
    """
    net = unfused(net).cpu()
    stored = store_weights("executorch", net, 8)
    require_int8("format=executorch", net, stored)
    import torch.ao.quantization.fx._decomposed  # noqa: F401, PLC0415  (registers the operators)
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import (
        RemoveNoopExpandCopyPass,  # noqa: PLC0415  (an extra)
    )
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # noqa: PLC0415  (an extra)
    from executorch.exir import to_edge_transform_and_lower  # noqa: PLC0415  (an extra)

    rounded = _write_operators(net, stored)
    try:
        net(image)
        program = torch.export.export(net, (image,))
        lowered = to_edge_transform_and_lower(
            program, [RemoveNoopExpandCopyPass()], [XnnpackPartitioner()]
        )
        data = lowered.to_executorch().buffer
    except Exception as error:
        raise UsageError(
            f"format=executorch: ExecuTorch cannot hold this net: {' '.join(str(error).split())[:300]}"
        ) from error
    names = (
        str(node.target)
        for node in lowered.exported_program().graph.nodes
        if node.op == "call_function"
    )
    outside = Counter(name.split(".")[1] for name in names if name.startswith("aten."))
    return data, {"float_products": rounded, "outside_xnnpack": dict(outside)}


def _write_operators(net: nn.Module, stored: dict[str, StoredWeight]) -> list[str]:
    """Have linear layers and quantizers run as operators that XNNPACK knows; layers that stay float, `*` for their number."""
    on_codes = set()
    for name, weight in stored.items():
        layer = net.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, QuantLinear) and isinstance(layer.input_quantizer, FrozenActivation):
            _multiply_codes(layer, layer.input_quantizer, weight)
            on_codes.add(layer.input_quantizer)
        else:
            weight.frozen.stored = weight.value
            weight.frozen.in_graph = lambda _, frozen=weight.frozen: frozen.stored
    rest = [
        module
        for module in net.modules()
        if isinstance(module, FrozenActivation) and module not in on_codes
    ]
    for grid in rest:
        grid.in_graph = functools.partial(_round, float(grid.scale), grid.qmin, grid.qmax)
    return list(
        dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", grid.name).rpartition(".")[0] for grid in rest)
    )


def _round(step: float, lowest: int, highest: int, x: Tensor) -> Tensor:
    """Numbers on the grid."""
    operators, x = torch.ops.quantized_decomposed, x.clamp(lowest * step, highest * step)
    grid = step, 0, LOWEST, HIGHEST, torch.int8
    return operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *grid), *grid)


def _multiply_codes(layer: Any, grid: FrozenActivation, weight: StoredWeight) -> None:
    """Let a linear layer be one of XNNPACK, with an 8-bit input and a weight of 4 or 8 bits."""
    step, operators, frozen = float(grid.scale), torch.ops.quantized_decomposed, weight.frozen
    bounds = (
        (-8, 7)
        if int(weight.codes.min()) >= -8 and int(weight.codes.max()) <= 7
        else (LOWEST, HIGHEST)
    )
    frozen.stored, frozen.scale = (
        F.pad(weight.codes, (0, 2)),
        weight.scale.expand(len(weight.codes)).contiguous(),
    )
    frozen.shift = torch.zeros(len(weight.codes), dtype=torch.int64)
    layer.register_buffer("ends", None)

    def forward(x: Tensor) -> Tensor:
        if layer.ends is None:  # the first time, before torch traces it
            layer.ends = torch.tensor([LOWEST * step, HIGHEST * step]).repeat(*x.shape[:-1], 1)
        x = torch.cat([x.clamp(grid.qmin * step, grid.qmax * step), layer.ends], -1)
        found = (
            *operators.choose_qparams_per_token_asymmetric(x, torch.int8),
            LOWEST,
            HIGHEST,
            torch.int8,
        )
        x = operators.dequantize_per_token(
            operators.quantize_per_token(x, *found), *found, torch.float32
        )
        return F.linear(
            x,
            operators.dequantize_per_channel(
                frozen.stored, frozen.scale, frozen.shift, 0, *bounds, torch.int8
            ),
            layer.bias,
        )

    layer.forward = forward
