"""Write a quantized model as an ExecuTorch file: `export.py format=executorch`.

ExecuTorch's XNNPACK backend computes linear layers on integer codes. XNNPACK derives the step size
of each row of inputs from the smallest and largest number of the row. Therefore, each row gets two
more numbers: -128 and 127 times the trained step size, with weights of zero. XNNPACK then uses this
step size, and its codes equal the model's codes.
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
from qat.export.check import (
    MAX_ROUNDING_RATIO,
    SLIGHT_FACTOR,
    CheckResult,
    check_difference,
    compare,
)
from qat.export.codes import StoredWeight, store_weights
from qat.export.runtimes import EXECUTORCH, open_session, quiet, session_logits
from qat.export.write import copy_unfused, require_int8
from qat.model.frozen import FrozenActivation
from qat.nn import LOGITS, named_outputs
from qat.nn.linear import QuantLinear

INT8_MIN = -128
INT8_MAX = 127


def write_pte(
    path: Path, frozen: nn.Module, net: nn.Module, images: Sequence[Tensor]
) -> tuple[CheckResult, dict[str, Any]]:
    """Write an ExecuTorch file, and compare it with its model.

    Args:
        path: the file.
        frozen: the model to write.
        net: the model that was frozen, or `frozen` itself.
        images: (B, C, H, W) each.

    Returns:
        The comparison of file and model; and the dict that `to_pte` returns, with an additional
        entry `logits_apart`: the maximum difference, relative to the largest logit.

    Raises:
        UsageError: ExecuTorch does not support the model.
    """
    content, report = to_pte(frozen, images[0][:1])
    path.write_bytes(content)
    logits = functools.partial(session_logits, open_session(path, EXECUTORCH), batch=1)
    agreement = compare(net, logits, None, images)
    # ExecuTorch does not return codes, so they cannot be compared. Images that differ only by float
    # rounding show how much the logits change if values on thresholds get other codes.
    check_difference(agreement, net, images, lambda x: x * SLIGHT_FACTOR, MAX_ROUNDING_RATIO)
    report = report | {"logits_apart": round(agreement.relative_error, 6)}
    return CheckResult({EXECUTORCH: agreement}), report


@quiet()
@torch.no_grad()
def to_pte(net: nn.Module, image: Tensor) -> tuple[bytes, dict[str, Any]]:
    """Translate a model to the content of an ExecuTorch file, which takes one image at a time.

    Args:
        net: a result of `qat.freeze`, or a float model.
        image: (1, C, H, W), an image of the model's input size.

    Returns:
        The content of the file, and a dict with two entries. `float_products` lists modules that
        use rounded activations in float operators; `outside_xnnpack` counts, by name, the ATen
        operators that run in ExecuTorch's own kernels.

    Raises:
        UsageError: XNNPACK does not support a quantizer, the model is not a classifier, or torch or
            ExecuTorch cannot export it.
    """
    net = copy_unfused(net).cpu()
    stored = store_weights("executorch", net, 8)
    require_int8("format=executorch", net, stored)
    for module in net.modules():
        if isinstance(module, FrozenActivation) and module.before is not None:
            raise UsageError(f"format=executorch: {module.name} must have no offset")
    if list(named_outputs(net(image))) != [LOGITS]:
        raise UsageError("format=executorch: the only output of the model must be logits")
    # ExecuTorch is an optional dependency.
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (registers the operators)
    from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import (
        RemoveNoopExpandCopyPass,
    )
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    float_products = _write_operators(net, stored)
    try:
        net(image)
        program = torch.export.export(net, (image,))
        lowered_program = to_edge_transform_and_lower(
            program, [RemoveNoopExpandCopyPass()], [XnnpackPartitioner()]
        )
        content = lowered_program.to_executorch().buffer
    except Exception as error:
        cause = str(error)[:300]
        raise UsageError(
            f"format=executorch: ExecuTorch cannot export this model: {cause}"
        ) from error
    outside_xnnpack: Counter[str] = Counter()
    for node in lowered_program.exported_program().graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and name.startswith("aten."):
            outside_xnnpack[name.split(".")[1]] += 1
    return content, {
        "float_products": float_products,
        "outside_xnnpack": dict(outside_xnnpack),
    }


def _write_operators(net: nn.Module, stored: dict[str, StoredWeight]) -> list[str]:
    """Replace linear layers and quantizers by operators that XNNPACK supports.

    Returns the names of modules that use rounded activations in float operators, with `*` in place
    of indices.
    """
    integer_quantizers = set()
    for name, weight in stored.items():
        layer = net.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, QuantLinear) and isinstance(layer.input_quantizer, FrozenActivation):
            _multiply_codes(layer, layer.input_quantizer, weight)
            integer_quantizers.add(layer.input_quantizer)
        else:
            weight.frozen.stored = weight.value
            weight.frozen.in_graph = lambda _, frozen=weight.frozen: frozen.stored
    float_layers: dict[str, None] = {}  # in order, without repetitions
    for module in net.modules():
        if isinstance(module, FrozenActivation) and module not in integer_quantizers:
            step = float(module.scale)
            module.in_graph = functools.partial(_round, step, module.qmin, module.qmax)
            name = re.sub(r"\.\d+(?=\.)", ".*", module.name)
            float_layers[name.rpartition(".")[0]] = None
    return list(float_layers)


def _round(step: float, qmin: int, qmax: int, x: Tensor) -> Tensor:
    """Round `x` to the grid of a quantizer."""
    operators = torch.ops.quantized_decomposed
    x = x.clamp(qmin * step, qmax * step)
    grid = (step, 0, INT8_MIN, INT8_MAX, torch.int8)
    codes = operators.quantize_per_tensor(x, *grid)
    return operators.dequantize_per_tensor(codes, *grid)


def _multiply_codes(layer: Any, quantizer: FrozenActivation, weight: StoredWeight) -> None:
    """Make XNNPACK run a linear layer on integers: an 8-bit input and a 4- or 8-bit weight."""
    operators = torch.ops.quantized_decomposed
    step = float(quantizer.scale)
    bounds = (INT8_MIN, INT8_MAX)
    if int(weight.codes.min()) >= -8 and int(weight.codes.max()) <= 7:
        bounds = (-8, 7)
    frozen = weight.frozen
    out_features = len(weight.codes)
    frozen.stored = F.pad(weight.codes, (0, 2))
    frozen.scale = weight.scale.expand(out_features).contiguous()
    frozen.shift = torch.zeros(out_features, dtype=torch.int64)
    layer.register_buffer("ends", None)

    def forward(x: Tensor) -> Tensor:
        # The first call sets `ends`; torch traces a later call.
        if layer.ends is None:
            layer.ends = torch.tensor([INT8_MIN * step, INT8_MAX * step]).repeat(*x.shape[:-1], 1)
        x = torch.cat([x.clamp(quantizer.qmin * step, quantizer.qmax * step), layer.ends], -1)
        row_grid = (
            *operators.choose_qparams_per_token_asymmetric(x, torch.int8),
            INT8_MIN,
            INT8_MAX,
            torch.int8,
        )
        codes = operators.quantize_per_token(x, *row_grid)
        x = operators.dequantize_per_token(codes, *row_grid, torch.float32)
        matrix = operators.dequantize_per_channel(
            frozen.stored, frozen.scale, frozen.shift, 0, *bounds, torch.int8
        )
        return F.linear(x, matrix, layer.bias)

    layer.forward = forward
