"""Print the types of all values of a file for TensorRT: `python -m evidence.tensorrt_types`.

DeiT-S of `deploy_w8a8` (random weights) is exported with `format.target=tensorrt`. The types are
those that onnx's shape inference finds.
"""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path

import onnx
import timm
import torch

import qat

MODEL = "deit_small_patch16_224"


def export(attention: str, path: Path) -> onnx.GraphProto:
    """Export the model; return its graph with the types of all values."""
    torch.manual_seed(0)
    net = timm.create_model(MODEL).eval()
    images = torch.randn(4, 3, 224, 224)
    qat.convert(net, qat.recipe("deploy_w8a8", attention=attention))
    qat.initialize_scales(net, [images])
    qat.export_onnx(net, path, images=images, target="tensorrt")
    return onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph


def names_by_type(graph: onnx.GraphProto) -> dict[tuple[str, str], list[str]]:
    """Names of values by the operator that computes them and their type.

    `constant` and `input` count as operators.
    """
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    operators = dict.fromkeys(types, "constant")
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    operators |= {value.name: "input" for value in graph.input}
    for node in graph.node:
        operators |= dict.fromkeys(node.output, node.op_type)
    names = collections.defaultdict(list)
    for name, operator in operators.items():
        names[operator, onnx.TensorProto.DataType.Name(types[name])].append(name)
    return dict(sorted(names.items()))


def main() -> None:
    """Print a table for quantized attention, and one for attention in float."""
    for attention in ("standard", "float"):
        with tempfile.TemporaryDirectory() as folder:
            graph = export(attention, Path(folder) / "net.onnx")
        print(f"{MODEL}, deploy_w8a8, attention={attention}\n")
        print("| operator | type of its output | values |\n|---|---|---|")
        for (operator, kind), names in names_by_type(graph).items():
            listed = f" ({', '.join(names)})" if kind == "FLOAT" else ""
            print(f"| {operator} | {kind} | {len(names)}{listed} |")
        print()


if __name__ == "__main__":
    main()
