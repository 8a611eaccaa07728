"""Compile this package's C++ source with the system's compiler, and cache the library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_TIMEOUT = 60  # seconds
# These options reorder only sums marked in the source; -ffast-math would change other results.
_FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp-simd",
    "-shared",
    "-fPIC",
)
# Tried in order, fastest first: not every compiler knows the processor or has OpenMP.
_EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


def load(source: str) -> ctypes.CDLL:
    """Load the library of C++ source text; compile the text unless the library is in the cache.

    Raises:
        OSError: there is no compiler, the compiler failed, or the library cannot be loaded.
        subprocess.TimeoutExpired: the compiler takes longer than `_TIMEOUT` seconds.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise OSError("the compiler $CXX, or c++ if CXX is not set, does not exist")
    folder = _cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return ctypes.CDLL(str(_compile(source, compiler, Path(temporary) / "kernels.so")))
    library = folder / f"kernels-{_cache_key(source, compiler)}.so"
    with contextlib.suppress(OSError):  # if missing or damaged, it is compiled below
        return ctypes.CDLL(str(library))
    return ctypes.CDLL(str(_compile(source, compiler, library)))


def _compile(source: str, compiler: str, library: Path) -> Path:
    """Compile to a temporary file and rename it, so that the library is complete at every moment.

    Another process may compile the same library, or this one may be killed.
    """
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source_path = Path(folder) / "kernels.cpp"
        output_path = Path(folder) / "kernels.so"
        source_path.write_text(source)
        for extras in _EXTRAS:
            process = subprocess.run(
                [compiler, *_FLAGS, *extras, "-o", output_path, source_path],
                check=False,
                capture_output=True,
                timeout=_TIMEOUT,
            )
            if process.returncode == 0:
                output_path.replace(library)
                return library
    first_line = process.stderr.decode(errors="replace").strip().partition("\n")[0]
    raise OSError(f"{compiler} fails: {first_line}")


def _cache_key(source: str, compiler: str) -> str:
    compiler_path = Path(compiler).resolve()
    parts = (
        source,
        _FLAGS,
        _EXTRAS,
        compiler_path,
        compiler_path.stat().st_mtime_ns,
        platform.machine(),
        _processor_features(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def _processor_features() -> str:
    """Description of the processor, which may differ on machines that share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        if line.startswith(("flags", "Features")):
            return line
    return platform.processor()


def _cache_folder() -> Path | None:
    """The cache folder, whose files are executed; None unless only this user can write to it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "qat"
    if not folder.is_absolute():  # no home directory, or XDG_CACHE_HOME is relative
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return None
    is_own = status.st_uid == os.geteuid()
    is_writable_by_others = bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    if is_own and not is_writable_by_others and os.access(folder, os.W_OK):
        return folder
    return None
