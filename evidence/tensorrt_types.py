"""Print the types of all values of a file for TensorRT: `python -m evidence.tensorrt_types`.

DeiT-S of `deploy_w8a8` (random weights) is exported with `format.target=tensorrt`. The types are
those that onnx's shape inference finds.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
from pathlib import Path

import onnx
import timm
import torch

import qat

SIZE = 224


def exported(model: str, attention: str, path: Path) -> onnx.GraphProto:
    """Graph of an exported model, with the types of its values."""
    torch.manual_seed(0)
    net = timm.create_model(model).eval()
    images = torch.randn(4, 3, SIZE, SIZE)
    qat.convert(net, qat.recipe("deploy_w8a8", attention=attention))
    qat.initialize_scales(net, [images])
    qat.export_onnx(net, path, images=images, target="tensorrt")
    return onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph


def types_by_operator(graph: onnx.GraphProto) -> dict[tuple[str, str], list[str]]:
    """Names of values by operator and type; `constant` and `input` count as operators."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    makers = dict.fromkeys(types, "constant")
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    makers |= {value.name: "input" for value in graph.input}
    for node in graph.node:
        makers |= dict.fromkeys(node.output, node.op_type)
    names = collections.defaultdict(list)
    for name, operator in makers.items():
        names[operator, onnx.TensorProto.DataType.Name(types[name])].append(name)
    return dict(sorted(names.items()))


def main() -> None:
    """Print a table for quantized attention, and one for attention in float."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224")
    arguments = parser.parse_args()
    for attention in ("standard", "float"):
        with tempfile.TemporaryDirectory() as folder:
            graph = exported(arguments.model, attention, Path(folder) / "net.onnx")
        print(f"{arguments.model}, deploy_w8a8, attention={attention}\n")
        print("| operator | type of its output | values |\n|---|---|---|")
        for (operator, kind), names in types_by_operator(graph).items():
            named = f" ({', '.join(names)})" if kind == "FLOAT" else ""
            print(f"| {operator} | {kind} | {len(names)}{named} |")
        print()


if __name__ == "__main__":
    main()
