"""Rules that rewrite a graph that torch and onnxscript have written.

For example, an offset added to a LayerNormalization becomes part of its bias, and the codes of
low-bit weights are stored as INT4 or INT2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qat.export.codes import StoredWeight
from qat.export.write import CODES

# OpenVINO fuses these operators with a factor that follows them.
_FUSED_WITH_FACTOR = frozenset({"Add", "Mul", "LayerNormalization", "Gelu"})
# Onnxruntime moves QuantizeLinear before these operators, or fuses these operators with a Conv
# before them.
_PASSED_OPERATORS = frozenset({
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Relu",
    "Clip",
    "BatchNormalization",
})
_NARROW_TYPES = {4: ml_dtypes.int4, 2: ml_dtypes.int2}


def simplify(model: ir.Model) -> None:
    """Rewrite a graph in place by rules that do not change what it computes.

    Two rules simplify the graph; `_keep_dimensions` and `_add_dimension` add operators that keep
    OpenVINO from fusing wrongly.
    """
    rules = {
        "Add": _fold_into_layer_norm,
        "Reshape": _skip_reshape,
        "ReduceMean": _keep_dimensions,
        "QuantizeLinear": _add_dimension,
    }
    for node in list(model.graph):
        if node.op_type in rules:
            rules[node.op_type](model.graph, node)
    RemoveUnusedNodesPass()(model)


def _constant_array(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant. Returns None for any other value."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def _split_constant(node: ir.Node) -> Any:
    """Return the inputs of an operator as (variable, constant array); None without a constant."""
    left, right = node.inputs
    for variable, constant in ((left, right), (right, left)):
        array = _constant_array(constant)
        if array is not None:
            return variable, array
    return None


def _single_use(value: ir.Value | None, kind: str) -> Any:
    """The operator of type `kind` that computes `value`; None if there is none.

    Also returns None if `value` is a graph output or is not used exactly once.
    """
    if value is None:
        return None
    node = value.producer()
    if node is None or node.op_type != kind or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return node


def _insert(
    graph: ir.Graph, before: ir.Node, kind: str, *inputs: Any, **attributes: Any
) -> ir.Value:
    """Insert an operator before the operator `before`, and return the new operator's result."""
    node = ir.node(kind, inputs, attributes)
    graph.insert_before(before, node)
    return node.outputs[0]


def _store(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add a constant to the graph."""
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _fold_into_layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    """Replace LayerNormalization(x, g, b) + c by LayerNormalization(x, g, b + c)."""
    parts = _split_constant(node)
    if parts is None or node.outputs[0].is_graph_output():
        return
    normalized, offset = parts
    norm = _single_use(normalized, "LayerNormalization")
    if norm is None or len(norm.inputs) < 3:
        return
    bias = _constant_array(norm.inputs[2])
    if bias is None:
        return
    is_per_channel = offset.size == bias.size and offset.shape[-1:] == bias.shape
    if offset.size != 1 and not is_per_channel:
        return
    norm.replace_input_with(2, _store(graph, f"{norm.name}.bias", bias + offset.reshape(-1)))
    node.outputs[0].replace_all_uses_with(normalized)


def _skip_reshape(graph: ir.Graph, node: ir.Node) -> None:
    """Skip a Reshape before a Reshape to a constant shape, unless a 0 there copies a size."""
    first = _single_use(node.inputs[0], "Reshape")
    shape = _constant_array(node.inputs[1])
    if first and shape is not None and (shape != 0).all():
        node.replace_input_with(0, first.inputs[0])


def _keep_dimensions(graph: ir.Graph, node: ir.Node) -> None:
    """Set `keepdims` on a mean, and squeeze the result.

    Otherwise OpenVINO 2026.4 wrongly fuses the mean with the next quantizer.
    """
    if node.attributes.get_int("keepdims", 1) or len(node.inputs) < 2:
        return
    if node.outputs[0].is_graph_output():  # no quantizer follows
        return
    node.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
    squeeze_node = ir.node("Squeeze", [node.outputs[0], node.inputs[1]])
    node.outputs[0].replace_all_uses_with(squeeze_node.outputs[0])
    squeeze_node.replace_input_with(0, node.outputs[0])
    graph.insert_after(node, squeeze_node)


def _add_dimension(graph: ir.Graph, node: ir.Node) -> None:
    """Move the inverse step sizes of a Mul from dimension 1 to 2, by an inserted dimension.

    OpenVINO 2026.4 fuses Mul, Clip and QuantizeLinear, except if step sizes vary along dimension 2.
    In files for any number of images, the fused operator uses the first step size for all values,
    unless it is itself part of a larger fused operator.
    """
    clip = _single_use(node.inputs[0], "Clip")
    if clip is None:
        return
    mul = _single_use(clip.inputs[0], "Mul")
    if mul is None:
        return
    parts = _split_constant(mul)
    if parts is None:
        return
    x, step = parts
    producer = x.producer()
    if producer is not None and producer.op_type in _FUSED_WITH_FACTOR:
        return
    if step.ndim < 3 or step.shape[1] == 1 or step.size != step.shape[1]:
        return
    axis = _store(graph, f"{mul.name}.axis", np.array([1]))
    wide_step = _store(graph, f"{mul.name}.step", np.expand_dims(step, 1))
    wide_x = _insert(graph, clip, "Unsqueeze", x, axis)
    product = _insert(graph, clip, "Mul", wide_x, wide_step)
    clip.replace_input_with(0, _insert(graph, clip, "Squeeze", product, axis))


def separate_divisions(model: ir.Model) -> None:
    """Make quantizers after MaxPool, Conv or Gemm divide by the step size in a separate operator.

    Codes do not change. Without the rule, onnxruntime moves QuantizeLinear before MaxPool, and its
    8-bit MaxPool takes a hundred times as long as the float MaxPool. Onnxruntime would also round
    weights of a Conv between DequantizeLinear and QuantizeLinear to 8 bits with one scale.
    """
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    for node in quantizers:
        producer = node.inputs[0].producer()  # type: ignore[union-attr]
        while producer is not None and _can_move_past(producer):
            producer = producer.inputs[0].producer()  # type: ignore[union-attr]
        if producer is None or producer.op_type not in {"MaxPool", "Conv", "Gemm"}:
            continue
        unit_step = _store(model.graph, f"{node.name}.one", np.array(1, np.float32))
        node.replace_input_with(0, _insert(model.graph, node, "Div", *node.inputs[:2]))
        node.replace_input_with(1, unit_step)


def _can_move_past(node: ir.Node) -> bool:
    """True if QuantizeLinear may move past: `_PASSED_OPERATORS`; Mul, Add with 4-D constants.

    A frozen batch norm consists of such a Mul and Add, with constants (1, C, 1, 1).
    """
    if node.op_type in {"Mul", "Add"}:
        parts = _split_constant(node)
        return parts is not None and parts[1].ndim == 4
    return node.op_type in _PASSED_OPERATORS


def narrow_weights(model: ir.Model, stored: Mapping[str, StoredWeight]) -> None:
    """Store codes of weights of width 4 or 2 as INT4 or INT2, and add operators that widen them.

    The operators cast to 8 bits and, if `StoredWeight.is_doubled`, compute 2 * codes + 1.
    Runtimes run them only once, when they open a file.
    """
    graph = model.graph
    int8_one = _store(graph, "onnx.int8_one", np.array(1, np.int8))
    for value in list(graph.initializers.values()):
        weight_name, _, name = (value.name or "").rpartition(".")
        if name != CODES or weight_name not in stored:
            continue
        width = stored[weight_name].width
        if width not in _NARROW_TYPES:
            continue
        first_node = graph[0]
        codes = value.const_value.numpy()  # type: ignore[union-attr]
        narrow_codes = codes.astype(_NARROW_TYPES[width])
        narrow_value = _store(graph, f"{value.name}.stored", narrow_codes)
        factors = _insert(graph, first_node, "Cast", narrow_value, to=ir.DataType.INT8)
        if stored[weight_name].is_doubled:
            doubled = _insert(graph, first_node, "Add", factors, factors)
            factors = _insert(graph, first_node, "Add", doubled, int8_one)
        value.replace_all_uses_with(factors)
    RemoveUnusedNodesPass()(model)
