"""A command that kills itself with SIGKILL at a moment that is sure: `python benchmarks/stress_moments.py MOMENT train.py ...`.

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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Wrapper = Callable[..., Any]
_step: list[int] = []


def die() -> None:
    """Say where, and be gone."""
    if _step:
        os.write(1, f"\nkilled at step {_step[0]}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def watch(owner: Any, name: str, around: Callable[[Wrapper], Wrapper]) -> None:
    """Put a function in the place of another."""
    setattr(owner, name, around(getattr(owner, name)))


def dies(number: int, *, behind: bool, applies: Callable[..., bool] = lambda *_: True) -> Callable[[Wrapper], Wrapper]:
    """A wrapper that dies in front of the n-th call that counts, or behind it."""
    calls = [0]

    def around(function: Wrapper) -> Wrapper:
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


def tears(number: int, name: str) -> Callable[[Wrapper], Wrapper]:
    """A wrapper of `open` whose n-th write to the end of a file is half a write."""
    calls = [0]

    def around(function: Wrapper) -> Wrapper:
        def wrapped(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            opened = function(file, mode, *args, **options)
            if mode != "a" or os.path.basename(str(file)) != name:
                return opened
            calls[0] += 1
            return opened if calls[0] < number else _Torn(opened)

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


def half_saved(number: int, name: str) -> Callable[[Wrapper], Wrapper]:
    """A wrapper of `torch.save`: of the n-th file that will be called so, the first half is on the disk."""
    calls = [0]

    def around(function: Wrapper) -> Wrapper:
        def wrapped(content: Any, path: Any, *args: Any, **options: Any) -> None:
            function(content, path, *args, **options)
            calls[0] += Path(path).name.startswith(f".{name}.")
            if calls[0] == number and Path(path).name.startswith(f".{name}."):
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        return wrapped

    return around


def _note_steps(training_step: Wrapper) -> Wrapper:
    def wrapped(module: Any, *args: Any) -> Any:
        _step[:] = [module.global_step]
        return training_step(module, *args)

    return wrapped


def arm(moment: str) -> None:
    """Prepare for a moment; an empty one never comes."""
    import lightning.pytorch
    import torch

    from qat.callbacks import LastCheckpoint
    from qat.lit import QATModule
    from qat.ptq.fitness import Evaluator

    watch(QATModule, "training_step", _note_steps)
    if not moment:
        return
    kind, *name, count = moment.split(":")
    file, number = name[0] if name else "", int(count)

    def onto(source: Any, target: Any, *_: Any) -> bool:
        return Path(target).name == file

    table: dict[str, tuple[Any, str, Callable[[Wrapper], Wrapper]]] = {
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
    watch(*table[kind])


def run(moment: str, script: str, arguments: list[str]) -> None:
    """Run a script of the repository as its command would."""
    sys.argv = [str(ROOT / script), *arguments]
    sys.path.insert(0, str(ROOT))
    arm(moment)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
