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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra

import qat
import qat.cli.entry  # noqa: F401  (registers the resolvers of the configs)
from studies.arms import ROOT, Arm, Arms, Places, Run, preset
from studies.collect import Done, collect

log = logging.getLogger("qat.studies")

POLL_S = 1.0
FOLDER = "FOLDER"
PEERS_PYTHON = ROOT / "outputs" / "peers" / "bin" / "python"


def run_all(wanted: Sequence[str], root: str | None, workers: int, places: Places, *, only_seed: int | None = None) -> int:
    """Run what has no record yet, each behind what it needs.

    Args:
        wanted: claims or arms; nothing = all.
        root: folder of the data; None where none is needed.
        workers: processes at a time, of one thread each.
        places: of the study.
        only_seed: leaves runs of other seeds for later.

    Returns:
        How many runs failed, or could not start because one that they need failed.
    """
    arms = Arms.read(places)
    waiting = arms.to_do(wanted, only_seed)
    log.info("%d runs to do", len(waiting))
    going: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    failed = 0
    while waiting or going:
        for key in [key for key, process in going.items() if process.poll() is not None]:
            code = going.pop(key).returncode
            failed += code != 0
            log.info("%s seed %d: %s, %d to go", *key, "done" if code == 0 else f"FAILED ({code})", len(waiting) + len(going))
        to_come = {(arm.path, seed) for arm, seed in waiting} | set(going)
        ready = next((run for run in waiting if len(going) < workers and _may_start(run, arms, to_come)), None)
        if ready is not None:
            waiting.remove(ready)
            going[ready[0].path, ready[1]] = _start(ready, root, arms)
        elif going:
            time.sleep(POLL_S)
        elif waiting:
            log.error("%d runs wait for ones that failed", len(waiting))
            return failed + len(waiting)
    return failed


def _may_start(run: Run, arms: Arms, to_come: Collection[tuple[str, int]]) -> bool:
    return all(arms.is_done(arm, seed) and (arm.path, seed) not in to_come for arm, seed in arms.needed(*run))


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
    place = arms.run_dir(arm, seed)
    settings = arms.settings(arm, seed)
    done = Done(execute(arm.command, place, settings, root), ROOT / place, arm.command, command_line(arm.command, place, settings, root))
    further = {}
    for name, entry in arm.further.items():
        own = _further_settings(arm, seed, entry, arms)
        results = execute(entry["command"], place / name, own, root)
        further[name] = Done(results, ROOT / place / name, entry["command"], command_line(entry["command"], place / name, own, root))
    if arm.keep:
        kept = arms.kept_path(arm, seed)
        kept.parent.mkdir(parents=True, exist_ok=True)
        qat.save(qat.load(ROOT / place / "checkpoints" / "best.ckpt"), kept)
    collect(arm, seed, done, further, arms.starts(arm, seed), arms.record_path(arm, seed))


def outdated(arms: Arms, root: str | None = FOLDER) -> list[str]:
    """Records whose commands are not those that their claims ask for any more: their figures would stand beside another arm's name."""
    found = []
    for arm, seed in arms.runs():
        path = arms.record_path(arm, seed)
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        again = f"once it is removed, python -m studies run {arm.path}"
        if _recorded(record) != _asked(arm, seed, arms, root):
            found.append(f"{path}: made by other commands than {arm.path} asks for; {again}")
        elif record["starts"] != arms.starts(arm, seed):
            found.append(f"{path}: made from other weights than those in {arms.places.results}; {again}")
    return found


def _recorded(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return [_in_force(command) for command in (record["command"], *record["further_commands"].values())]


def _asked(arm: Arm, seed: int, arms: Arms, root: str | None) -> list[dict[str, str]]:
    place = arms.run_dir(arm, seed)
    commands = [command_line(arm.command, place, arms.settings(arm, seed), root)]
    for name, entry in arm.further.items():
        commands.append(command_line(entry["command"], place / name, _further_settings(arm, seed, entry, arms), root))
    return [_in_force(command) for command in commands]


def _in_force(command: str) -> dict[str, str]:
    """Words and settings of a command; of a setting that is made twice the last counts."""
    return dict(word.partition("=")[::2] for word in shlex.split(command))


def _further_settings(arm: Arm, seed: int, entry: Mapping[str, Any], arms: Arms) -> list[str]:
    weights = arms.checkpoint(f"{arm.path}@{entry.get('weights', 'best')}", seed)
    return [*preset(entry.get("use", ())), *entry.get("set", ()), f"ckpt={weights}", f"seed={seed}"]


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
    if not results.exists():
        return False
    found = json.loads(results.read_text(encoding="utf-8"))
    return not found.get("error") and found.get("complete", True) is not False


def _compose(command: str, place: Path, settings: Sequence[str], root: str | None) -> Any:
    own = ["report=false", *(["resume=auto"] if command != "eval" else []), *([f"data.root='{root}'"] if root else [])]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose(command, overrides=[f"run_dir='{place}'", *own, *settings])


def _run_peer(place: Path, settings: Sequence[str], root: str | None) -> None:
    command = [str(PEERS_PYTHON), "-m", "studies.peers", f"run_dir={place}", *([f"data.root={root}"] if root else []), *settings]
    signal.signal(signal.SIGTERM, _leave)  # `run` then ends its child too, which would go on beside the next one
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": "."})


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def command_line(command: str, place: Path, settings: Sequence[str], root: str | None) -> str:
    """What a person types for it."""
    program = "python -m studies.peers" if command == "peers" else f"python {command}.py"
    return " ".join([program, f"run_dir={place}", *([f"data.root={FOLDER}"] if root else []), *map(shlex.quote, settings)])
