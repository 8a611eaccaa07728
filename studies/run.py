"""Runs arms and writes their records: several at a time, each in a process of its own; what is there already is not run again."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra

import qat
import qat.tasks.conf  # noqa: F401  (registers the functions of the configs)
from studies.arms import ROOT, Arms, Places, Run, preset
from studies.claims import Arm, Further
from studies.collect import Done, collect
from studies.records import read_record

log = logging.getLogger("qat.studies")

POLL_S = 1.0
FOLDER = "FOLDER"
PEERS_PYTHON = ROOT / "outputs" / "peers" / "bin" / "python"


def run_all(wanted: Sequence[str], root: str | None, workers: int, places: Places) -> int:
    """Run what has no record yet, each behind what it needs.

    Args:
        wanted: claims or arms; nothing = all.
        root: folder of the data; None where none is needed.
        workers: processes at a time, of one thread each.
        places: of the study.

    Returns:
        How many runs failed, or could not start because one that they need failed.
    """
    arms = Arms.read(places)
    waiting = arms.to_do(wanted)
    log.info("%d runs to do", len(waiting))
    going: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    failed = 0
    while waiting or going:
        for key in [key for key, process in going.items() if process.poll() is not None]:
            code = going.pop(key).returncode
            failed += code != 0
            log.info("%s seed %d: %s, %d to go", *key, "done" if code == 0 else f"FAILED ({code})", len(waiting) + len(going))
        to_come = {(arm.path, seed) for arm, seed in waiting} | set(going)
        ready = [run for run in waiting if all(arms.is_done(*one) and (one[0].path, one[1]) not in to_come for one in arms.needed(*run))]
        if ready and len(going) < workers:
            waiting.remove(ready[0])
            going[ready[0][0].path, ready[0][1]] = _start(ready[0], root, arms)
        elif going:
            time.sleep(POLL_S)
        elif waiting:
            log.error("%d runs wait for ones that failed", len(waiting))
            return failed + len(waiting)
    return failed


def _start(run: Run, root: str | None, arms: Arms) -> subprocess.Popen[bytes]:
    arm, seed = run
    place = ROOT / arms.run_dir(arm, seed)
    place.mkdir(parents=True, exist_ok=True)
    folders = [f"--{name}={getattr(arms.places, name)}" for name in ("claims", "results", "runs")]
    command = [sys.executable, "-m", "studies", "one", arm.path, f"--seed={seed}", *([f"--root={root}"] if root else []), *folders]
    with (place / "study.log").open("ab") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_one(path: str, seed: int, root: str | None, places: Places) -> None:
    """One run in this process, its further commands, what is kept of it."""
    arms = Arms.read(places)
    arm = arms[path]
    done = [
        Done(execute(command, place, settings, root), ROOT / place, command, command_line(command, place, settings, root))
        for command, place, settings in _commands(arm, seed, arms)
    ]
    if arm.keep:
        kept = arms.record_path(arm, seed).with_suffix(".pt")
        kept.parent.mkdir(parents=True, exist_ok=True)
        qat.save(qat.load(done[0].place / "checkpoints" / "best.ckpt"), kept)
    collect(arm, seed, done[0], dict(zip(arm.further, done[1:], strict=True)), arms.starts(arm, seed), arms.record_path(arm, seed))


def _commands(arm: Arm, seed: int, arms: Arms) -> list[tuple[str, Path, list[str]]]:
    """Command, run directory and settings of a run and of what comes behind it."""
    place = arms.run_dir(arm, seed)
    further = [(one.command, place / name, _further_settings(arm, seed, one, arms)) for name, one in arm.further.items()]
    return [(arm.command, place, arms.settings(arm, seed)), *further]


def _further_settings(arm: Arm, seed: int, further: Further, arms: Arms) -> list[str]:
    weights = arms.checkpoint(f"{arm.path}@{further.weights}", seed)
    return [*preset(further.use), *further.set, f"ckpt={weights}", f"seed={seed}"]


def outdated(arms: Arms, root: str | None = FOLDER) -> list[str]:
    """Records whose commands are not those that their claims ask for any more: their figures would stand beside another arm's name."""
    found = []
    for arm, seed in arms.runs():
        path = arms.record_path(arm, seed)
        if not path.exists():
            continue
        record = read_record(path)
        asked = [_in_force(command_line(*one, root), _steps_now) for one in _commands(arm, seed, arms)]
        again = f"once it is removed, python -m studies run {arm.path}"
        steps = _steps_then if record.format == 1 else _steps_now
        made = [_in_force(command, steps) for command in (record.command, *record.further_commands.values())]
        if made != asked:
            found.append(f"{path}: made by other commands than {arm.path} asks for; {again}")
        elif record.starts != arms.starts(arm, seed):
            found.append(f"{path}: made from other weights than those in {arms.places.results}; {again}")
    return found


def _in_force(command: str, steps: Callable[[str], str]) -> dict[str, str]:
    """Words and settings of a command; of a setting that is made twice the last counts.

    Args:
        command: as it is typed.
        steps: what `quant.steps` was for a recipe where the command does not say; where nothing is quantized it says nothing.
    """
    words = dict(word.partition("=")[::2] for word in shlex.split(command))
    recipe, library = words.get("quant", "ofq"), words.get("library", "qat")
    if recipe == "fp" or library != "qat" or not {"train.py", "studies.peers"} & words.keys():
        words.pop("quant.steps", None)
        return words
    return {"quant.steps": steps(recipe), **words}


def _steps_now(recipe: str) -> str:
    return "absolute" if recipe.startswith("minmax") else "relative"


def _steps_then(recipe: str) -> str:
    """When records had format 1."""
    return "relative" if recipe.startswith("seq") else "absolute"


def execute(command: str, place: Path, settings: Sequence[str], root: str | None) -> dict[str, Any]:
    """Run a command in this process unless its results are there.

    Returns:
        What is in its `results.json`.
    """
    results = ROOT / place / "results.json"
    if not _is_whole(results):
        if command == "peers":
            _run_peer(place, settings, root)
        else:
            name = "evaluate" if command == "eval" else command
            getattr(importlib.import_module(f"qat.tasks.{name}"), name)(_compose(command, place, settings, root))
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return found


def _is_whole(results: Path) -> bool:
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"error": "not there"}
    return not found.get("error") and found.get("complete", True) is not False


def _compose(command: str, place: Path, settings: Sequence[str], root: str | None) -> Any:
    own = ["report=false", *(["resume=auto"] if command not in {"eval", "analyze"} else []), *([f"data.root='{root}'"] if root else [])]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose(command, overrides=[f"run_dir='{place}'", *own, *settings])


def _run_peer(place: Path, settings: Sequence[str], root: str | None) -> None:
    command = [str(PEERS_PYTHON), "-m", "studies.peers", f"run_dir={place}", *([f"data.root={root}"] if root else []), *settings]
    # `run` then ends its child too, which would go on beside the next one.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": "."})


def command_line(command: str, place: Path, settings: Sequence[str], root: str | None) -> str:
    """What a person types for it."""
    program = "python -m studies.peers" if command == "peers" else f"python {command}.py"
    return " ".join([program, f"run_dir={place}", *([f"data.root={FOLDER}"] if root else []), *map(shlex.quote, settings)])
