"""Rules on a graph that torch has written and onnxscript has optimized, for what the two runtimes need.

An offset added to a LayerNormalization becomes part of its bias; codes of weights are stored at their width.
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

# What OpenVINO makes one operator of with a factor after it.
_JOINED = frozenset({"Add", "Mul", "LayerNormalization", "Gelu"})
# What onnxruntime moves QuantizeLinear along, as it does along MaxPool, or makes one operator of with Conv.
_PASSED = frozenset({
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Relu",
    "Clip",
    "BatchNormalization",
})
_NARROW = {4: ml_dtypes.int4, 2: ml_dtypes.int2}


def simplify(model: ir.Model) -> None:
    """Apply the rules that keep a graph's meaning."""
    rules = {
        "Add": _fold_into_layer_norm,
        "Reshape": _skip_reshape,
        "ReduceMean": _keep_dimensions,
        "QuantizeLinear": _set_apart,
    }
    for node in list(model.graph):
        if node.op_type in rules:
            rules[node.op_type](model.graph, node)
    RemoveUnusedNodesPass()(model)


def _array(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _split(node: ir.Node) -> Any:
    """What an operator changes, and the constant that it takes; None where it takes no constant."""
    for moving, constant in (node.inputs, reversed(node.inputs)):
        if (array := _array(constant)) is not None:
            return moving, array
    return None


def _only(value: ir.Value | None, kind: str) -> Any:
    """The operator that makes a value, if it is of a kind and nothing else takes the value."""
    node = value and value.producer()
    return node if node and node.op_type == kind and len(value.uses()) == 1 else None  # type: ignore[union-attr]


def _insert(
    graph: ir.Graph, before: ir.Node, kind: str, *inputs: Any, **attributes: Any
) -> ir.Value:
    """A further operator; gives its result."""
    made = ir.node(kind, inputs, attributes)
    graph.insert_before(before, made)
    return made.outputs[0]


def _store(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A further constant."""
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _fold_into_layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    """LayerNormalization(x, g, b) + c: LayerNormalization(x, g, b + c)."""
    parts = _split(node)
    norm = parts and _only(parts[0], "LayerNormalization")
    bias = _array(norm.inputs[2]) if norm and len(norm.inputs) > 2 else None
    if bias is not None and parts[1].size in {1, bias.size}:
        norm.replace_input_with(2, _store(graph, f"{norm.name}.bias", bias + parts[1].reshape(-1)))
        node.outputs[0].replace_all_uses_with(parts[0])


def _skip_reshape(graph: ir.Graph, node: ir.Node) -> None:
    """One shape after another is the last one, unless it copies sizes of the first."""
    first, shape = _only(node.inputs[0], "Reshape"), _array(node.inputs[1])
    if first and shape is not None and (shape != 0).all():
        node.replace_input_with(0, first.inputs[0])


def _keep_dimensions(graph: ir.Graph, node: ir.Node) -> None:
    """Let a mean keep its dimensions: in OpenVINO 2026.4 one without them becomes a wrong operator with the quantizer after it."""
    if node.attributes.get_int("keepdims", 1) or len(node.inputs) < 2:
        return
    node.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
    squeezed = ir.node("Squeeze", [node.outputs[0], node.inputs[1]])
    node.outputs[0].replace_all_uses_with(squeezed.outputs[0])
    squeezed.replace_input_with(0, node.outputs[0])
    graph.insert_after(node, squeezed)


def _set_apart(graph: ir.Graph, node: ir.Node) -> None:
    """Let step sizes of dimension 1 be those of dimension 2 of a further one: Mul, Clip and QuantizeLinear would become one operator.

    In OpenVINO 2026.4, for any number of images, that operator takes the first step size for all, where it is not part of a larger one.
    """
    clip = _only(node.inputs[0], "Clip")
    mul = clip and _only(clip.inputs[0], "Mul")
    parts = mul and _split(mul)
    if not parts:
        return
    x, step = parts
    is_joined = x.producer() is not None and x.producer().op_type in _JOINED
    if is_joined or step.ndim < 3 or step.shape[1] == 1 or step.size != step.shape[1]:
        return
    axis, apart = (
        _store(graph, f"{mul.name}.axis", np.array([1])),
        _store(graph, f"{mul.name}.step", np.expand_dims(step, 1)),
    )
    product = _insert(graph, clip, "Mul", _insert(graph, clip, "Unsqueeze", x, axis), apart)
    clip.replace_input_with(0, _insert(graph, clip, "Squeeze", product, axis))


def divide_apart(model: ir.Model) -> None:
    """Let a division be an operator of its own where a quantizer stands after MaxPool or Conv: codes are the same to the last bit.

    onnxruntime moves QuantizeLinear before MaxPool, and its MaxPool of 8 bits takes a hundred times as long as that of float numbers. Of a
    Conv between DequantizeLinear and QuantizeLinear it rounds the weights to 8 bits of one scale.
    """
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        made = node.inputs[0].producer()  # type: ignore[union-attr]
        while made is not None and made.op_type in _PASSED:
            made = made.inputs[0].producer()  # type: ignore[union-attr]
        if made is not None and made.op_type in {"MaxPool", "Conv", "Gemm"}:
            one = _store(model.graph, f"{node.name}.one", np.array(1, np.float32))
            node.replace_input_with(0, _insert(model.graph, node, "Div", *node.inputs[:2]))
            node.replace_input_with(1, one)


def narrow_weights(model: ir.Model, stored: Mapping[str, StoredWeight]) -> None:
    """Store the codes of weights in the types that they fit, cast to 8 bits before what takes them: once, when a file is opened."""
    graph = model.graph
    one = _store(graph, "onnx.int8_one", np.array(1, np.int8))
    for value in list(graph.initializers.values()):
        site, _, last = (value.name or "").rpartition(".")
        if last != CODES or site not in stored or stored[site].width not in _NARROW:
            continue
        first, codes = graph[0], value.const_value.numpy().astype(_NARROW[stored[site].width])  # type: ignore[union-attr]
        wide = _insert(
            graph, first, "Cast", _store(graph, f"{value.name}.stored", codes), to=ir.DataType.INT8
        )
        if stored[site].is_doubled:
            wide = _insert(graph, first, "Add", _insert(graph, first, "Add", wide, wide), one)
        value.replace_all_uses_with(wide)
    RemoveUnusedNodesPass()(model)
