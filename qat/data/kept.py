"""What is made of image files and kept on the disk for the next run: decoded pixels, and encoded images in a form that can be mapped.

A file is called after what it was made of. It is written beside and renamed, so that several processes may start at once; nothing in it
is executed when it is read; who deletes it while no run maps it loses time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from qat.data.arrays import ImageArrays
from qat.data.encoded import EncodedImages, read_all
from qat.utils.files import remove_unfinished, replacing, write_text

log = logging.getLogger(__name__)

SLOW_S = 2.0
FORMAT = 1
MEGABYTE = 10**6


def cache_folder() -> Path:
    """`QAT_CACHE_DIR`, else `qat/images` where the caches of this user are."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QAT_CACHE_DIR") or Path(caches) / "qat" / "images").expanduser()


def stamp(path: str | Path) -> list[Any]:
    """What tells a file from what was or will be there: path, bytes, time of the last change.

    Raises:
        OSError: there is no such file.
    """
    found = Path(path).stat()
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns]


def place(origin: Any, suffix: str) -> Path:
    """Where something is kept that is made of `origin`, plain data."""
    name = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:32]
    return cache_folder() / f"{name}{suffix}"


@contextlib.contextmanager
def keeping(path: Path) -> Generator[Path]:
    """Yield a temporary path beside one in the cache, as `qat.utils.files.replacing`, once what killed writers have left is gone.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    remove_unfinished([path.parent])
    with replacing(path) as temporary:
        yield temporary


def decoded(encoded: EncodedImages, where: str, chans: int, on_error: str = "raise", *, cache: str | bool = "auto") -> ImageArrays:
    """All images, which must be of one size, decoded; from the disk if an earlier run has left them there.

    Args:
        encoded: the images.
        where: what holds them, for messages.
        chans: colour channels of the result.
        on_error: `raise`, or `skip` = leave out what cannot be decoded; such a set is not kept.
        cache: `auto` keeps what took more than `SLOW_S` to decode, True everything; False neither keeps nor looks.

    Raises:
        UsageError: an image cannot be decoded, there are none, or sizes differ.
    """
    found = find(encoded, chans, cache=cache)
    if found is not None:
        return found
    began = time.perf_counter()
    arrays = read_all(encoded, chans, on_error, where)
    seconds = time.perf_counter() - began
    if cache is not True and (cache is False or seconds <= SLOW_S):
        return arrays
    _keep(encoded, chans, arrays, f"{where}: decoded in {seconds:.0f} s")
    return find(encoded, chans, cache=cache) or arrays  # what is mapped is shared by the processes of a machine


def find(encoded: EncodedImages, chans: int, *, cache: str | bool = "auto") -> ImageArrays | None:
    """All images as they were kept, mapped from the disk and not to be written to; None where they are not there, or not whole."""
    origin = _origin(encoded, chans) if cache is not False else None
    if origin is None:
        return None
    path = place(origin, ".npy")
    try:
        known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        if known["origin"] == origin and images.dtype == np.uint8 and len(images) == len(encoded) and known["crc32"] == _sum(images):
            return ImageArrays(np.asarray(images), encoded.labels)
        log.warning("%s is damaged: decoding again", path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        log.warning("%s cannot be read (%s): decoding again", path, " ".join(f"{error}".split()))
    return None


def _keep(encoded: EncodedImages, chans: int, arrays: ImageArrays, why: str) -> None:
    origin = _origin(encoded, chans)
    if origin is None or arrays.left_out:
        return
    path = place(origin, ".npy")
    try:
        with keeping(path) as temporary, temporary.open("wb") as file:
            np.save(file, arrays.images, allow_pickle=False)
        write_text(path.with_suffix(".json"), json.dumps({"origin": origin, "crc32": _sum(arrays.images)}))
    except OSError as error:
        log.warning("%s; cannot be kept for the next run: %s (%s)", why, path, error.strerror)
        return
    log.info("%s; kept for the next run: %s, %.0f MB (data.cache=false: no)", why, path, arrays.images.nbytes / MEGABYTE)


def _origin(encoded: EncodedImages, chans: int) -> dict[str, Any] | None:
    """What decoded pixels depend on; None where a file cannot be looked at."""
    try:
        images = encoded.origin()
    except OSError:
        return None
    return {"format": FORMAT, "decoder": f"Pillow {PIL.__version__}", "chans": chans, "images": images}


def _sum(images: NDArray[np.uint8]) -> int:
    return zlib.crc32(np.ascontiguousarray(images).reshape(-1).data)
