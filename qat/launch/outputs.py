"""Files that runs leave in their directories: which make one a used directory, and which a new run there removes. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qat.errors import UsageError

RESULTS, CONFIG = "results.json", "config.yaml"
# What a training writes. Not train.log and rank-1.log ...: they are those of the run that asks, by then.
TRAINING = (
    *(f"checkpoints/{name}" for name in ("best.ckpt", "last.ckpt", "last.prev.ckpt")),
    "checkpoints/best-epoch*.ckpt",
    *(RESULTS, "metrics.csv", CONFIG, "command.json", "conversion.txt", "oscillation.csv", "report.html"),
    "events.out.tfevents.*",
    *(f"analysis/{name}{rest}" for name in ("cost", "weights") for rest in (".csv", ".json", "_*.csv", "_*.svg")),
)


class UsedError(UsageError):
    """The directory is another run's: nothing is written there, not even this error."""


def used(run_dir: Path) -> list[Path]:
    """Files that make a directory a used one, checkpoints first; none where a run failed before it saved anything."""
    found = checkpoints(run_dir)
    if not found and has_failed(run_dir):
        return []
    return found + [path for path in of_training(run_dir) if path not in found]


def checkpoints(run_dir: Path) -> list[Path]:
    """What a command could go on from, or start from."""
    return sorted([*run_dir.glob("checkpoints/*.ckpt"), *run_dir.glob("*.ckpt")])


def is_finished(run_dir: Path) -> bool:
    """True if there are results, and they are not the error of a run."""
    return (run_dir / RESULTS).exists() and not has_failed(run_dir)


def has_failed(run_dir: Path) -> bool:
    """True if the results are the error of a run."""
    return bool(_results(run_dir).get("error"))


def _results(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_own(run_dir: Path, command: str, weights: str | None = None) -> None:
    """Raise `UsedError` if there are a training's checkpoints, or results of another command or, where they are given, of other weights.

    For commands that write into a directory of theirs again: what is there would be replaced by what says nothing of it.
    """
    saved = sorted(run_dir.glob("checkpoints/*.ckpt"))
    found = {} if has_failed(run_dir) else _results(run_dir)
    another = found.get("command") not in {None, command} or (weights is not None and found.get("weights") not in {None, weights})
    if saved or another:
        held = saved[0].relative_to(run_dir) if saved else f"{RESULTS} of {found.get('command')}.py {found.get('weights')}"
        raise UsedError(f"run_dir={str(run_dir)!r} holds {held} already; choose another run_dir")


def of_training(run_dir: Path) -> list[Path]:
    """What a training has left, by name; a link is one of its files, and so is not followed."""
    return [path for pattern in TRAINING for path in sorted(run_dir.glob(pattern)) if path.is_symlink() or path.is_file()]


def replaced(run_dir: Path) -> list[Path]:
    """What a new training in a directory removes.

    Raises:
        UsedError: some of it is in a folder that is a link, and so belongs to another place.
    """
    found = of_training(run_dir)
    linked = next((path.parent for path in found if path.parent != run_dir and path.parent.is_symlink()), None)
    if linked is not None:
        raise UsedError(
            f"run_dir={str(run_dir)!r}: its folder {linked.name} is a link, behind which nothing is removed; must be another run_dir"
        )
    return found


class Found:
    """A directory as a command finds it.

    Args:
        run_dir: the directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self._was_used, self._config = run_dir, bool(used(run_dir)), _stamp(run_dir / CONFIG)

    def has_begun(self) -> bool:
        """True if the run has written its settings since, which it does once they are checked."""
        return _stamp(self.run_dir / CONFIG) != self._config

    def takes_error(self) -> bool:
        """True if results with the run's error would not stand among, or in place of, the files of another run."""
        return (self.has_begun() or not self._was_used) and not is_finished(self.run_dir)


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from another that has taken its name."""
    if not path.exists():
        return None
    at = path.stat()
    return at.st_ino, at.st_mtime_ns
