"""Outputs appear whole or not at all: write beside, flush to the disk, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, previous: str | None = None) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on an error nothing is left of it.

    Args:
        path: the file to write.
        previous: name beside it under which the file that is replaced stays; at no moment is there no complete `path`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        if previous is not None and target.exists():
            _keep(target, target.with_name(previous))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _keep(present: Path, previous: Path) -> None:
    """Give a file a second name, taking that name from another file if need be; a copy where links are not to be had."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}")
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(present)
    except OSError:
        shutil.copyfile(present, link)
    link.replace(previous)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_torch(path: str | os.PathLike[str], content: Any, *, previous: str | None = None) -> None:
    """`torch.save` atomically; see `replacing`."""
    with replacing(path, previous=previous) as temporary:
        torch.save(content, temporary)
