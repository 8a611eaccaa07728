"""The idx format of MNIST's family: a magic number, big-endian sizes, bytes. Source: yann.lecun.com/exdb/mnist, "file format"."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat.errors import UsageError

UNSIGNED_BYTES = 0x08


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of one file, gzipped or not.

    Args:
        path: of the file.
        dimensions: how many the array must have; images 3 (N, H, W), labels 1 (N,).

    Raises:
        UsageError: the file cannot be read, is not such an idx file, or its size is not what its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, UNSIGNED_BYTES, dimensions]) or len(content) < header:
        raise UsageError(f"{path}: is not an idx file of unsigned bytes with {dimensions} dimension(s)")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    if len(content) - header != math.prod(shape):
        raise UsageError(f"{path}: holds {len(content) - header} bytes of data, its header says {math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
