"""Decoded pixels that are kept on the disk for the next run.

A file is called after what it was made of. It is written beside and renamed, so that several processes may start at once; nothing in it
is executed when it is read; who deletes it while no run maps it loses time and nothing else. What no run has used for a week goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qat.data.arrays import MEGABYTE
from qat.utils.files import remove_unfinished, replacing

log = logging.getLogger(__name__)
# A file that no run has asked for so long goes when another one is written.
UNUSED_S = 7 * 24 * 3600
_NAME = re.compile(r"[0-9a-f]{32}\.npy")


def cache_folder() -> Path:
    """`QAT_CACHE_DIR`, else `qat/images` where the caches of this user are, of one without a home among temporary files."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(caches):
        caches = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return Path(os.path.expanduser(os.environ.get("QAT_CACHE_DIR") or os.path.join(caches, "qat", "images")))


def stamp(path: str | Path) -> list[Any]:
    """What tells a file from what was or will be there: path, bytes, time of the last change.

    Raises:
        OSError: there is no such file.
    """
    found = Path(path).stat()
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns]


def find(origin: Any) -> NDArray[np.uint8] | None:
    """The images (N, H, W, C) made of `origin`, mapped from the disk and not to be written to; None where they are not there.

    Args:
        origin: plain data: all that the pixels depend on.
    """
    path = _place(origin)
    try:
        found = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s cannot be read (%s): decoding again", path, " ".join(f"{error}".split()))
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return found


def keep(origin: Any, images: NDArray[np.uint8], why: str) -> None:
    """Write the images (N, H, W, C) made of `origin`; a warning where the disk does not take them.

    Args:
        origin: plain data: all that the pixels depend on.
        images: the pixels.
        why: where they come from and how long that took, for the log.
    """
    path = _place(origin)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished([path.parent])  # what killed writers have left
        _remove_unused(path.parent)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, images, allow_pickle=False)
    except OSError as error:
        log.warning("%s; cannot be kept for the next run: %s (%s)", why, path, error.strerror)
        return
    log.info("%s; kept for the next run: %s, %.0f MB (data.cache=false: no)", why, path, images.nbytes / MEGABYTE)


def _remove_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if _NAME.fullmatch(path.name) and time.time() - path.stat().st_mtime > UNUSED_S:
                path.unlink()


def _place(origin: Any) -> Path:
    name = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:32]
    return cache_folder() / f"{name}.npy"
