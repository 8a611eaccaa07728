"""C++ of ours, compiled with the system's compiler and kept in the user's cache."""

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

_TIMEOUT = 60
# No option that lets a compiler change a result, such as -ffast-math.
_FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp-simd",
    "-shared",
    "-fPIC",
)
# From the fastest down: not every compiler knows the machine it runs on, or has OpenMP.
_EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


def load(source: str) -> ctypes.CDLL:
    """A library made of C++ source text, compiled at most once for a machine and a compiler.

    Raises:
        OSError: there is no compiler, it failed, or what it made cannot be loaded.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise OSError("neither $CXX nor c++ is there")
    folder = _cache()
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return ctypes.CDLL(str(_compiled(source, compiler, Path(temporary) / "kernels.so")))
    library = folder / f"kernels-{_key(source, compiler)}.so"
    with contextlib.suppress(OSError):  # not there, or damaged: made again
        return ctypes.CDLL(str(library))
    return ctypes.CDLL(str(_compiled(source, compiler, library)))


def _compiled(source: str, compiler: str, library: Path) -> Path:
    """Written beside and renamed: another process may be at it as well, and may be killed."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        text, made = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        text.write_text(source)
        for extras in _EXTRAS:
            done = subprocess.run(
                [compiler, *_FLAGS, *extras, "-o", made, text],
                check=False,
                capture_output=True,
                timeout=_TIMEOUT,
            )
            if done.returncode == 0:
                made.replace(library)
                return library
    raise OSError(
        f"{compiler} fails: {done.stderr.decode(errors='replace').strip().partition(chr(10))[0]}"
    )


def _key(source: str, compiler: str) -> str:
    found = Path(compiler).resolve()
    parts = (
        source,
        _FLAGS,
        _EXTRAS,
        found,
        found.stat().st_mtime_ns,
        platform.machine(),
        _features(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def _features() -> str:
    """What the processor can do: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )


def _cache() -> Path | None:
    """A folder that nobody else can write to, None where there is none: what lies there is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "qat"
    if not folder.is_absolute():  # a user without a home
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError:
        return None
    is_private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_private and os.access(folder, os.W_OK) else None
