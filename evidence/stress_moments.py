"""A command that kills itself with SIGKILL at a moment that is sure.

A moment is `kind:number` or `kind:file:number`: the n-th time that something happens (to a file of that name). What happens is watched from
outside, by wrapping functions before the command is run; the command itself knows nothing of it.
"""

from __future__ import annotations

import io
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch
import torch

from qat.callbacks import LastCheckpoint
from qat.lit import QATModule
from qat.ptq.search import Evaluator

ROOT = Path(__file__).resolve().parents[1]
Function = Callable[..., Any]
_step: list[int] = []


def die() -> NoReturn:
    """Say where, and be gone."""
    if _step:
        os.write(1, f"\nkilled at step {_step[0]}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dies(number: int, *, behind: bool, applies: Callable[..., bool] = lambda *_: True) -> Callable[[Function], Function]:
    """A wrapper that dies in front of the n-th call that counts, or behind it."""
    calls = [0]

    def around(function: Function) -> Function:
        def wrapped(*args: Any, **options: Any) -> Any:
            counts = applies(*args)
            calls[0] += counts
            struck = counts and calls[0] == number
            if struck and not behind:
                die()
            result = function(*args, **options)
            if struck:
                die()
            return result

        return wrapped

    return around


class _Torn:
    """A file that holds half of what is written to it when the process dies."""

    def __init__(self, file: Any) -> None:
        self.file, self.text = file, io.StringIO(newline="")

    def __enter__(self) -> io.StringIO:
        return self.text

    def __exit__(self, *error: object) -> None:
        self.file.write(self.text.getvalue()[: len(self.text.getvalue()) // 2])
        self.file.flush()
        die()


def tears(number: int, name: str) -> Callable[[Function], Function]:
    """A wrapper of `open` whose n-th write to the end of a file is half a write."""
    calls = [0]

    def around(function: Function) -> Function:
        def wrapped(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            opened = function(file, mode, *args, **options)
            calls[0] += mode == "a" and os.path.basename(str(file)) == name
            return _Torn(opened) if calls[0] == number else opened

        return wrapped

    return around


def half_saved(number: int, name: str) -> Callable[[Function], Function]:
    """A wrapper of `torch.save`: of the n-th file that will be called so, the first half is on the disk."""
    calls = [0]

    def around(function: Function) -> Function:
        def wrapped(content: Any, path: Any, *args: Any, **options: Any) -> None:
            function(content, path, *args, **options)
            calls[0] += Path(path).name.startswith(f".{name}.")
            if calls[0] == number:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        return wrapped

    return around


def _noting_steps(training_step: Function) -> Function:
    def wrapped(module: Any, *args: Any) -> Any:
        _step[:] = [module.global_step]
        return training_step(module, *args)

    return wrapped


def prepare(moment: str) -> None:
    """Watch for a moment; an empty one never comes."""
    QATModule.training_step = _noting_steps(QATModule.training_step)  # type: ignore[method-assign]
    if not moment:
        return
    kind, *name, count = moment.split(":")
    file, number = name[0] if name else "", int(count)

    def onto(source: Any, target: Any, *_: Any) -> bool:
        return Path(target).name == file

    table: dict[str, tuple[Any, str, Callable[[Function], Function]]] = {
        "forward": (QATModule, "training_step", dies(number, behind=True)),
        "update": (lightning.pytorch.LightningModule, "configure_gradient_clipping", dies(number, behind=True)),
        "validation": (QATModule, "validation_step", dies(number, behind=True)),
        "epoch_end": (LastCheckpoint, "on_train_epoch_end", dies(number, behind=False)),
        "half": (torch, "save", half_saved(number, file)),
        "linked": (os, "link", dies(number, behind=True)),
        "complete": (os, "replace", dies(number, behind=False, applies=onto)),
        "replaced": (os, "replace", dies(number, behind=True, applies=onto)),
        "torn": (io, "open", tears(number, file)),
        "candidate": (Evaluator, "fitness", dies(number, behind=False)),
    }
    owner, attribute, around = table[kind]
    setattr(owner, attribute, around(getattr(owner, attribute)))


def become(moment: str, command: list[str], out: int) -> NoReturn:
    """Be a command of the repository, in a process that was forked for it; what it says goes to an open file."""
    code: Any = 1
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = [str(ROOT / command[0]), *command[1:]]
        prepare(moment)
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
