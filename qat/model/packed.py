"""One small file for a frozen net: codes side by side at their width, all other numbers as float32, an index of both. docs/deployment.md.

A safetensors file with two tensors, `codes` (bytes) and `floats`, and metadata: `qat` (JSON: model, recipe, data, classes), `index`
(zlib, base64: JSON), `crc32`. A tensor with a name of its own for each weight would take a hundred bytes of header: a tenth of a small net.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.packing import pack_codes, packed_bytes, unpack_codes, unpack_pairs
from qat.model.frozen import OFFSETS, FrozenBlocks, FrozenWeight
from qat.utils.files import MOST_CONSTANT, replacing

# The second one, with blocks of floats, which are tensors of their own.
FORMATS = "packed-1", "packed-2"
_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in vars(torch).values()
    if isinstance(kind, torch.dtype)
}


def write_packed(net: nn.Module, path: str | Path, meta: Mapping[str, Any]) -> dict[str, int]:
    """Write a frozen net, whole or not at all.

    Args:
        net: of `qat.freeze`.
        path: the file.
        meta: of `qat.model.metadata.describe`.

    Returns:
        Bytes of codes, scales (with zero points), offsets, the rest that stays in float, and the header (index, recipe, classes).
    """
    widths = {
        f"{name}.stored": module.spec.bits
        for name, module in net.named_modules()
        if isinstance(module, FrozenWeight)
    }
    blocks = {
        name: module for name, module in net.named_modules() if isinstance(module, FrozenBlocks)
    }
    codes, floats, index = [], [], []
    sums = {"codes": 0, "scales": 0, "offsets": 0, "rest": 0}
    for name, tensor in net.state_dict().items():
        shape, (owner, _, kind) = list(tensor.shape), name.rpartition(".")
        if owner in blocks:
            if kind == "stored":
                index.append([owner, shape, "b", widths[name], blocks[owner].empty.dim])
        elif name in widths:
            codes.append(pack_codes(tensor.cpu(), widths[name]))
            index.append([name, shape, "s" if tensor.dtype == torch.int8 else "u", widths[name]])
            sums["codes"] += len(codes[-1])
        elif tensor.numel() and (tensor == tensor.flatten()[0]).all():
            index.append([
                name,
                shape,
                "c",
                tensor.flatten()[0].item(),
                str(tensor.dtype).removeprefix("torch."),
            ])
        else:
            floats.append(tensor.detach().cpu().float().flatten())
            index.append([name, shape, "f", str(tensor.dtype).removeprefix("torch.")])
            sums[_kind(name)] += floats[-1].nbytes
    packed = base64.b64encode(
        zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)
    ).decode()
    tensors = {
        "codes": torch.cat([torch.zeros(0, dtype=torch.uint8), *codes]),
        "floats": torch.cat([torch.zeros(0), *floats]),
    }
    for name, module in blocks.items():
        for part, tensor in module.packed().items():
            tensors[f"{name}.{part}"] = tensor.cpu().contiguous()
            sums["codes" if part == "qdata" else "scales"] += tensor.nbytes
    metadata = {
        "format": FORMATS[bool(blocks)],
        "qat": json.dumps(dict(meta), separators=(",", ":")),
        "index": packed,
    }
    metadata["crc32"] = _checksum(tensors, *metadata.values())
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)
    return sums | {"header": Path(path).stat().st_size - sum(sums.values())}


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    if "_quantizer." not in name:
        return "offsets" if last == "product_offset" else "rest"
    return "offsets" if last in OFFSETS else "scales"


def _checksum(tensors: Mapping[str, Tensor], *said: str) -> str:
    """CRC-32 of all bytes of codes and floats, of other tensors by name, and of the texts of the header, in this order, as eight digits."""
    names = ["codes", "floats", *sorted(tensors.keys() - {"codes", "floats"})]
    content = (
        b"".join(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in names)
        + "".join(said).encode()
    )
    return f"{zlib.crc32(content):08x}"


def read_packed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights by name and what the file says of the net; None for a safetensors file of another kind.

    Raises:
        UsageError: the file is of a newer format.
        ValueError, LookupError, TypeError: its parts do not fit together.
    """
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if "qat" not in metadata:
            return None
        if metadata.get("format") not in FORMATS:
            raise UsageError(
                f"{str(path)!r}: format {metadata.get('format')!r}; this version of qat reads {' and '.join(FORMATS)}"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    said = (metadata["format"], metadata["qat"], metadata["index"])
    if metadata["crc32"] not in {
        _checksum(tensors, *said),
        _checksum(tensors),
    }:  # older files: of the tensors alone
        raise ValueError("it is damaged: its checksum does not fit")
    # At most this many bytes, of which a tensor takes less than a hundred: two megabytes may unpack to two gigabytes.
    index = json.loads(zlib.decompressobj().decompress(base64.b64decode(metadata["index"]), 2**23))
    if (
        constants := sum(max(math.prod(shape), 0) for _, shape, kind, *_ in index if kind == "c")
    ) > MOST_CONSTANT:
        raise ValueError(f"its index lists {constants} numbers that are missing")
    state, at = {}, {"codes": 0, "floats": 0}
    for name, shape, kind, *more in index:
        if kind == "c":
            state[name] = torch.full(shape, more[0], dtype=_DTYPES[more[1]])
            continue
        if kind == "b":
            parts = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
            qdata, dim = parts.pop(f"{name}.qdata").view(torch.uint8), more[1]
            state[f"{name}.stored"] = (
                unpack_pairs(qdata, shape[dim]) if more[0] == 4 else qdata
            ).movedim(-1, dim)
            state |= {
                key: t.view(torch.uint8) if key.endswith(".scale") else t
                for key, t in parts.items()
            }
            continue
        n, which = torch.Size(shape).numel(), "floats" if kind == "f" else "codes"
        size = n if kind == "f" else packed_bytes(n, more[0])
        part = tensors[which][at[which] : at[which] + size]
        at[which] += size
        state[name] = (
            part.view(shape).to(_DTYPES[more[0]])
            if kind == "f"
            else unpack_codes(part, more[0], tuple(shape), signed=kind == "s")
        )
    if at != {name: tensor.numel() for name, tensor in tensors.items()}:
        raise ValueError("it holds more data than its index lists")
    return state, json.loads(metadata["qat"])
