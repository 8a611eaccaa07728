"""What is done to a graph when torch has written it: constants that meet, and codes stored at their width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from qat.export.stored_weights import WIDTHS, Stored
from qat.export.write import CODES
from qat.functional.packing import pack_codes

if TYPE_CHECKING:
    import onnx


_ONE = "onnx.int8_one"
# What OpenVINO makes one operator of with a factor behind it.
_JOINED = frozenset({"Add", "Mul", "LayerNormalization", "Gelu"})
# What onnxruntime moves QuantizeLinear along, as it does along MaxPool.
_VIEWS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice"})


class Constants:
    """A graph whose operators on constants meet.

    Args:
        graph: is changed.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        from onnx import numpy_helper  # noqa: PLC0415  (an extra)

        self.graph, self.helper = graph, numpy_helper
        self.makers = {name: node for node in graph.node for name in node.output}
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(value.name for value in graph.output)
        self.values = {tensor.name: tensor for tensor in graph.initializer}

    def split(self, node: onnx.NodeProto) -> tuple[str, str] | None:
        """Names of what an operator changes, and of the constant that it takes; None where it takes no constant."""
        if len(node.input) != 2:
            return None
        for moving, constant in (node.input, reversed(node.input)):
            if self.is_constant(constant) and not self.is_constant(moving):
                return moving, constant
        return None

    def is_constant(self, name: str) -> bool:
        """True of an initializer, and of what is made of initializers alone."""
        if name in self.values:
            return True
        node = self.makers.get(name)
        return node is not None and bool(node.input) and all(map(self.is_constant, node.input))

    def only(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The operator that makes a value, if it is of a kind and nothing else takes the value."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind and self.uses[name] == 1 else None

    def value(self, name: str) -> np.ndarray | None:
        """Of an initializer."""
        found: np.ndarray | None = self.helper.to_array(self.values[name]) if name in self.values else None
        return found

    def store(self, name: str, value: np.ndarray) -> str:
        """A further initializer; its name."""
        made = self.helper.from_array(np.array(value, order="C"), name)
        self.graph.initializer.append(made)
        self.values[name] = self.graph.initializer[-1]
        return name

    def add(self, kind: str, inputs: Sequence[str], output: str, *, beside: onnx.NodeProto, behind: bool = False) -> None:
        """A further operator, called like what it gives, in front of another, or behind it."""
        from onnx import helper  # noqa: PLC0415  (an extra)

        made = helper.make_node(kind, inputs, [output], name=output)
        at = next(i for i, one in enumerate(self.graph.node) if one is beside or one.name == beside.name)
        self.graph.node.insert(at + behind, made)
        self.makers[output] = made

    def skip(self, node: onnx.NodeProto, by: onnx.NodeProto) -> None:
        """Take an operator out; another gives its result."""
        gone = by.output[0]
        by.output[0] = node.output[0]
        self.makers[by.output[0]] = by
        self.makers.pop(gone)
        self.graph.node.remove(node)


def simplify(model: onnx.ModelProto) -> None:
    """Let constants meet, one operator in place of two: a factor behind a factor, what is added behind a LayerNormalization."""
    found = Constants(model.graph)
    for node in list(model.graph.node):
        if node.op_type == "Mul":
            _factors(found, node)
        elif node.op_type == "Add":
            _norm(found, node)
        elif node.op_type == "Reshape":
            _shape(found, node)
        elif node.op_type == "ReduceMean":
            _mean(found, node)
    for node in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        _set_apart(found, node)
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _factors(found: Constants, node: onnx.NodeProto) -> None:
    """(x * a + y * b) * c with one number c: x * (a * c) + y * (b * c), where a runtime multiplies the constants once."""
    parts = found.split(node)
    outer = parts and found.value(parts[1])
    if not parts or outer is None or outer.size != 1 or not _takes_factor(found, parts[0]):
        return
    last = found.makers[parts[0]]
    _multiply(found, parts[0], parts[1])
    found.skip(node, last)


def _takes_factor(found: Constants, name: str) -> bool:
    node = found.makers.get(name)
    if node is None or found.uses[name] != 1:
        return False
    if node.op_type == "Mul":
        return found.split(node) is not None
    return node.op_type == "Add" and all(found.is_constant(one) or _takes_factor(found, one) for one in node.input)


def _multiply(found: Constants, name: str, factor: str) -> None:
    """Multiply what makes a value."""
    node = found.makers[name]
    if node.op_type == "Mul":
        parts = found.split(node)
        assert parts is not None  # noqa: S101  (`_takes_factor`)
        _replace(found, node, parts[1], factor)
        return
    for one in list(node.input):
        if found.is_constant(one):
            _replace(found, node, one, factor)
        else:
            _multiply(found, one, factor)


def _replace(found: Constants, node: onnx.NodeProto, constant: str, factor: str) -> None:
    """Put constant * factor in place of the constant that an operator takes."""
    place = list(node.input).index(constant)
    name = f"{node.name}.{place}.{factor}"
    node.input[place] = name
    found.add("Mul", [constant, factor], name, beside=node)


def _shape(found: Constants, node: onnx.NodeProto) -> None:
    """One shape behind another is the last one, unless it copies sizes of the first."""
    first, shape = found.only(node.input[0], "Reshape"), found.value(node.input[1])
    if first is not None and shape is not None and (shape != 0).all():
        first.input[1] = node.input[1]
        del first.attribute[:]
        found.skip(node, first)


def _set_apart(found: Constants, node: onnx.NodeProto) -> None:
    """Let steps of dimension 1 be those of dimension 2 of a further one: Mul, Clip and QuantizeLinear would become one operator.

    In OpenVINO 2026.4, for any number of images, that operator takes the first step for all, where it is not part of a larger one.
    """
    clip = found.only(node.input[0], "Clip")
    mul = clip and found.only(clip.input[0], "Mul")
    parts = mul and found.split(mul)
    step = parts and found.value(parts[1])
    if not clip or not mul or not parts or step is None or step.ndim < 3 or step.shape[1] == 1 or step.size != step.shape[1]:
        return
    before = found.makers.get(parts[0])
    if before is not None and before.op_type in _JOINED:
        return
    name, output = mul.name, mul.output[0]
    axis = found.store(f"{name}.axis", np.array([1]))
    mul.input[:] = [f"{name}.above", found.store(f"{name}.step", np.expand_dims(step, 1))]
    mul.output[0] = f"{name}.apart"
    found.add("Squeeze", [mul.output[0], axis], output, beside=mul, behind=True)
    found.add("Unsqueeze", [parts[0], axis], mul.input[0], beside=mul)


def divide_behind_maximum(model: onnx.ModelProto) -> None:
    """Let a division be an operator of its own where a quantizer stands behind MaxPool: codes are the same to the last bit.

    onnxruntime moves QuantizeLinear in front of MaxPool, and its MaxPool of 8 bits takes a hundred times as long as that of float numbers.
    """
    found = Constants(model.graph)
    behind = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and _is_maximum(found, node.input[0])]
    one = found.store("onnx.no_step", np.array(1, np.float32)) if behind else ""
    for node in behind:
        divided = f"{node.name}.divided"
        found.add("Div", list(node.input[:2]), divided, beside=node)
        node.input[:2] = [divided, one]


def _is_maximum(found: Constants, name: str) -> bool:
    """Whether a value comes from MaxPool through what onnxruntime moves QuantizeLinear along."""
    node = found.makers.get(name)
    while node is not None and node.op_type in _VIEWS:
        node = found.makers.get(node.input[0])
    return node is not None and node.op_type == "MaxPool"


def _mean(found: Constants, node: onnx.NodeProto) -> None:
    """Let a mean keep its dimensions: in OpenVINO 2026.4 one without them becomes a wrong operator with the quantizer behind it."""
    kept = next((one for one in node.attribute if one.name == "keepdims"), None)
    if kept is None or kept.i or len(node.input) < 2:
        return
    kept.i, output = 1, node.output[0]
    node.output[0] = f"{output}.kept"
    found.makers[node.output[0]] = node
    found.add("Squeeze", [node.output[0], node.input[1]], output, beside=node, behind=True)


def _norm(found: Constants, node: onnx.NodeProto) -> None:
    """LayerNormalization(x, g, b) + c: LayerNormalization(x, g, b + c)."""
    parts = found.split(node)
    norm = parts and found.only(parts[0], "LayerNormalization")
    if not parts or not norm or len(norm.input) < 3:
        return
    bias, added = found.value(norm.input[2]), found.value(parts[1])
    if bias is None or added is None or added.size not in {1, bias.size}:
        return
    norm.input[2] = found.store(f"{norm.name}.bias", bias + added.reshape(-1))
    found.skip(node, norm)


def narrow(model: onnx.ModelProto, forms: Mapping[str, Stored]) -> None:
    """Store the codes of weights in the types that they fit, cast to 8 bits in front of what takes them: once, when a file is opened."""
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415  (an extra)

    graph, casts = model.graph, []
    for tensor in graph.initializer:
        site, _, last = tensor.name.rpartition(".")
        if last != CODES or site not in forms or forms[site].kind == "INT8":
            continue
        form, name = forms[site], tensor.name
        codes = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        tensor.raw_data = pack_codes(codes, WIDTHS[form.kind]).numpy().tobytes()
        tensor.data_type = getattr(TensorProto, form.kind)
        tensor.name = f"{name}.stored"
        wide = f"{name}.wide" if form.is_doubled else name
        casts.append(helper.make_node("Cast", [tensor.name], [wide], name=wide, to=TensorProto.INT8))
        if form.is_doubled:
            casts += [
                helper.make_node("Add", [wide, wide], [f"{name}.doubled"], name=f"{name}.doubled"),
                helper.make_node("Add", [f"{name}.doubled", _ONE], [name], name=name),
            ]
    if any(form.is_doubled for form in forms.values()):
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.int8), _ONE))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
