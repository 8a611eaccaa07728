"""Packed files: a frozen or float model in one small file.

A packed file is a safetensors file with two tensors, `codes` (uint8, codes packed bit by bit) and
`floats`, and more tensors for blocks of floats. Its metadata are `format`, `qat` (JSON: model,
recipe, data, classes ...), `index` (JSON in zlib and base64) and `crc32`. If each weight were a
named tensor, it would need a hundred bytes of header: in a small model, a tenth of the file.
docs/deployment.md describes the format.
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
from qat.utils.files import MAX_CONSTANT_NUMBERS, replace_atomically

# The second format adds blocks of floats, which are stored as separate tensors.
FORMATS = ("packed-1", "packed-2")
# Limit on the bytes to which a file's index unpacks: otherwise 2 MB could become 2 GB. At about
# 100 bytes for each tensor, the index can list 80,000 tensors.
_MAX_INDEX_BYTES = 2**23
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


def write_packed(net: nn.Module, path: str | Path, meta: Mapping[str, Any]) -> dict[str, int]:
    """Write a model to a packed file. If this fails, no file is created or replaced.

    Args:
        net: a model that `qat.freeze` returned, or a float model.
        path: the file.
        meta: metadata from `qat.model.metadata.describe`.

    Returns:
        A dict with the bytes of `codes`, `scales` (with zero points), `offsets`, `rest` (other
        floats) and `header` (all else, such as index and recipe).
    """
    packer = _Packer(net)
    for name, tensor in net.state_dict().items():
        packer.add(name, tensor)
    tensors = packer.tensors()
    index = json.dumps(packer.index, separators=(",", ":"))
    metadata = {
        "format": FORMATS[1] if packer.blocks else FORMATS[0],
        "qat": json.dumps(dict(meta), separators=(",", ":")),
        "index": base64.b64encode(zlib.compress(index.encode(), 9)).decode(),
    }
    metadata["crc32"] = _checksum(tensors, *metadata.values())
    with replace_atomically(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)
    header = Path(path).stat().st_size - sum(packer.sizes.values())
    return {**packer.sizes, "header": header}


class _Packer:
    """Codes, floats and index of a file that is being written.

    An entry of the index is [name, shape, kind, ...]; the kinds are "s" and "u" (signed and
    unsigned codes, with their bits), "f" (floats, with their dtype), "c" (one number for a whole
    tensor, and its dtype) and "b" (blocks of floats, with bits and the dimension of the blocks).

    Attributes:
        index: entries, in the order of the state dict.
        sizes: bytes by kind of content.
        blocks: weights in blocks of floats, by name.
    """

    def __init__(self, net: nn.Module) -> None:
        self.index: list[list[Any]] = []
        self.sizes = {"codes": 0, "scales": 0, "offsets": 0, "rest": 0}
        self.blocks: dict[str, FrozenBlocks] = {}
        self._widths: dict[str, int] = {}
        self._codes: list[Tensor] = []
        self._floats: list[Tensor] = []
        for name, module in net.named_modules():
            if isinstance(module, FrozenBlocks):
                self.blocks[name] = module
            if isinstance(module, FrozenWeight):
                self._widths[f"{name}.stored"] = module.spec.bits

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor of the state dict; for blocks of floats, add only the index entry."""
        owner, _, last_part = name.rpartition(".")
        shape = list(tensor.shape)
        if owner in self.blocks:
            if last_part == "stored":
                dim = self.blocks[owner].empty_grid.dim
                self.index.append([owner, shape, "b", self._widths[name], dim])
        elif name in self._widths:
            self._add_codes(name, tensor)
        elif tensor.numel() and (tensor == tensor.flatten()[0]).all():
            self.index.append([name, shape, "c", tensor.flatten()[0].item(), _dtype_name(tensor)])
        else:
            floats = tensor.detach().cpu().float().flatten()
            self._floats.append(floats)
            self.index.append([name, shape, "f", _dtype_name(tensor)])
            self.sizes[_size_key(name)] += floats.nbytes

    def _add_codes(self, name: str, tensor: Tensor) -> None:
        bits = self._widths[name]
        codes = pack_codes(tensor.cpu(), bits)
        self._codes.append(codes)
        signedness = "s" if tensor.dtype == torch.int8 else "u"
        self.index.append([name, list(tensor.shape), signedness, bits])
        self.sizes["codes"] += len(codes)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the file, by name; the bytes of blocks of floats are added to `sizes`."""
        tensors = {
            "codes": torch.cat([torch.zeros(0, dtype=torch.uint8), *self._codes]),
            "floats": torch.cat([torch.zeros(0), *self._floats]),
        }
        for name, module in self.blocks.items():
            for part, tensor in module.pack().items():
                tensors[f"{name}.{part}"] = tensor.cpu().contiguous()
                self.sizes["codes" if part == "qdata" else "scales"] += tensor.nbytes
        return tensors


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size_key(name: str) -> str:
    """The key of `_Packer.sizes` under which a tensor of kind "f" counts."""
    last_part = name.rpartition(".")[2]
    if "_quantizer." not in name:
        return "offsets" if last_part == "product_offset" else "rest"
    return "offsets" if last_part in OFFSETS else "scales"


def _checksum(tensors: Mapping[str, Tensor], *header: str) -> str:
    """CRC-32 (eight hexadecimal digits) of codes, floats, other tensors, and texts of the header.

    The other tensors are sorted by name; names are not part of the checksum.
    """
    checksum = 0
    for name in ("codes", "floats", *sorted(tensors.keys() - {"codes", "floats"})):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    checksum = zlib.crc32("".join(header).encode(), checksum)
    return f"{checksum:08x}"


def read_packed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a packed file.

    Returns:
        Weights by name, and the metadata that `describe` returned; None for any other
        safetensors file.

    Raises:
        UsageError: the file has an unknown format, from a newer version of qat.
        ValueError, LookupError, TypeError and others: the file is damaged or cannot be read.
    """
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if "qat" not in metadata:
            return None
        if metadata.get("format") not in FORMATS:
            raise UsageError(
                f"{str(path)!r}: format {metadata.get('format')!r}; "
                f"this version of qat reads {' and '.join(FORMATS)}; install a newer qat"
            )
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    header = (metadata["format"], metadata["qat"], metadata["index"])
    # In older files, the checksum covers only tensors.
    if metadata["crc32"] not in {_checksum(tensors, *header), _checksum(tensors)}:
        raise ValueError("the file is damaged: the checksum does not match")
    packed_index = base64.b64decode(metadata["index"])
    index_text = zlib.decompressobj().decompress(packed_index, _MAX_INDEX_BYTES)
    return _unpack(json.loads(index_text), tensors), json.loads(metadata["qat"])


def _unpack(index: list[list[Any]], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read weights by name from the tensors of a file, according to the file's index."""
    num_constants = sum(max(math.prod(shape), 0) for _, shape, kind, *_ in index if kind == "c")
    if num_constants > MAX_CONSTANT_NUMBERS:
        raise ValueError(
            f"the index lists constant tensors of {num_constants} numbers; "
            f"must be at most {MAX_CONSTANT_NUMBERS}"
        )
    state = {}
    codes = _Cursor(tensors["codes"])
    floats = _Cursor(tensors["floats"])
    for name, shape, kind, *details in index:
        num_elements = torch.Size(shape).numel()
        if kind == "c":
            number, dtype = details
            state[name] = torch.full(shape, number, dtype=_DTYPES[dtype])
        elif kind == "b":
            bits, dim = details
            parts = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
            state.update(_unpack_blocks(name, shape, bits, dim, parts))
        elif kind == "f":
            state[name] = floats.take(num_elements).view(shape).to(_DTYPES[details[0]])
        else:
            bits = details[0]
            packed = codes.take(packed_bytes(num_elements, bits))
            state[name] = unpack_codes(packed, bits, tuple(shape), signed=kind == "s")
    expected = {"codes": codes.position, "floats": floats.position}
    if expected != {name: tensor.numel() for name, tensor in tensors.items()}:
        raise ValueError("the file contains more data than the index lists")
    return state


class _Cursor:
    """Reads a flat tensor piece by piece."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.position = 0

    def take(self, size: int) -> Tensor:
        """Return the next `size` elements."""
        start = self.position
        self.position += size
        return self.tensor[start : self.position]


def _unpack_blocks(
    name: str, shape: list[int], bits: int, dim: int, parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Entries of the state dict for a weight in blocks of floats."""
    codes = parts.pop(f"{name}.qdata").view(torch.uint8)
    if bits == 4:
        codes = unpack_pairs(codes, shape[dim])
    entries = {f"{name}.stored": codes.movedim(-1, dim)}
    for key, tensor in parts.items():
        entries[key] = tensor.view(torch.uint8) if key.endswith(".scale") else tensor
    return entries
