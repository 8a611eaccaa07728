"""Run the arms of claims and write their records.

Several runs are executed at a time, each command in its own process. A run with a record is not
repeated.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import qat
from evidence.claims.arms import ROOT, Arms, Run, preset
from evidence.claims.claim import Arm
from evidence.claims.records import Record, add_record
from evidence.claims.results import read_measurements
from evidence.speed.timing import processor_type
from qat.errors import UsageError

log = logging.getLogger("qat.evidence")

# Programs of the commands that are modules of `evidence`.
PROGRAMS = {
    "peers": ["outputs/peers/bin/python", "-m", "evidence.peers"],
    "real": ["python", "-m", "evidence.real"],
}


class Command(NamedTuple):
    """A command of a run: name (see `Arm.command`), folder and overrides."""

    name: str
    run_dir: Path
    settings: Sequence[str]


def run_all(names: Sequence[str], root: str | None, workers: int, arms: Arms) -> int:
    """Execute all runs without a record, each after the runs that it needs.

    Args:
        names: claims or arms; empty = all.
        root: folder of CIFAR-10; None = the runs do not need CIFAR-10.
        workers: number of commands at a time, with one thread each.
        arms: all arms.

    Returns:
        Number of runs that failed, or could not start because a run that they need failed.
    """
    waiting = arms.to_do(names)
    failed: list[Run] = []
    log.info("%d runs to do", len(waiting))
    running: dict[Future[None], Run] = {}
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            unfinished = [*waiting, *running.values(), *failed]
            for arm, seed in list(waiting):
                if any(run in unfinished for run in arms.needed(arm, seed)):
                    continue
                waiting.remove((arm, seed))
                running[pool.submit(run_one, arm, seed, root, arms)] = arm, seed
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                arm, seed = running.pop(future)
                error = future.exception()
                if error:
                    failed.append((arm, seed))
                outcome = error or "done"
                num_left = len(waiting) + len(running)
                log.info("%s seed %d: %s, %d to go", arm.path, seed, outcome, num_left)
    return len(failed) + len(waiting)


def run_one(arm: Arm, seed: int, root: str | None, arms: Arms) -> None:
    """Run an arm with a seed and its further commands, and write the record.

    Raises:
        UsageError: the arm has no such seed.
    """
    if seed not in arm.seeds:
        raise UsageError(f"--seed {seed}: {arm.path} has the seeds {list(arm.seeds)}")
    run_dir = arms.run_dir(arm, seed)
    commands = [Command(arm.command, run_dir, arms.settings(arm, seed))]
    for name, further in arm.further.items():
        weights = arms.checkpoint(f"{arm.path}@{further.weights}", seed)
        settings = [*preset(further.use), *further.set, f"ckpt={weights}", f"seed={seed}"]
        commands.append(Command(further.command, run_dir / name, settings))
    results = [execute(*command, root) for command in commands]
    if arm.keep:
        _store_weights(run_dir, arms.weights_file(arm, seed))

    metrics, curves, maps = read_measurements(arm.command, results[0], ROOT / run_dir)
    for name, command, result in zip(arm.further, commands[1:], results[1:], strict=True):
        own_metrics, own_curves, own_maps = read_measurements(
            command.name, result, ROOT / command.run_dir
        )
        # Commands named w4_NAME, w3_NAME ... are points of a curve NAME over the bits.
        width = re.fullmatch(r"w(\d+)_(\w+)", name)
        if width:
            curves.setdefault(width[2], []).append([int(width[1]), own_metrics["top1"]])
        metrics |= _prefixed(name, own_metrics)
        curves |= _prefixed(name, own_curves)
        maps |= _prefixed(name, own_maps)
    seconds = [result["wall_seconds"] for result in results if result.get("wall_seconds")]
    data_root = "FOLDER" if root else None
    lines = [shlex.join(command_line(*command, data_root)) for command in commands]
    record = Record(
        claim=arm.claim,
        arm=arm.name,
        seed=seed,
        command=lines[0],
        further_commands=dict(zip(arm.further, lines[1:], strict=True)),
        starts={},
        metrics=metrics,
        curves=curves,
        maps=maps,
        wall_seconds=round(sum(seconds), 1) if seconds else None,
        machine=f"{processor_type()}, {os.cpu_count()} cores, 1 thread(s)",
        device=results[0]["device"],
        versions=results[0]["versions"],
        git_commit=results[0].get("git_commit"),
        date=datetime.date.today().isoformat(),
        correct=results[0].get("correct"),
    )
    add_record(arms.records, record)


def _store_weights(run_dir: Path, target: Path) -> None:
    (ROOT / target).parent.mkdir(parents=True, exist_ok=True)
    qat.save(qat.load(ROOT / run_dir / "checkpoints" / "best.ckpt"), ROOT / target)


def _prefixed(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in values.items()}


def command_line(
    command: str, run_dir: Path, settings: Sequence[str], root: str | None
) -> list[str]:
    """Command line of a run, as a user types it."""
    program = PROGRAMS.get(command, ["python", f"{command}.py"])
    data_root = [f"data.root={root}"] if root else []
    return [*program, f"run_dir={run_dir}", *data_root, *settings]


def execute(
    command: str, run_dir: Path, settings: Sequence[str], root: str | None
) -> dict[str, Any]:
    """Run a command unless its results exist; its output goes to a log file next to `run_dir`.

    Returns:
        Content of `results.json`.

    Raises:
        UsageError: the folder contains a run of other settings.
        CalledProcessError: the command failed.
    """
    path = ROOT / run_dir / "results.json"
    settings_file = path.with_name("evidence.txt")
    settings_text = shlex.join([command, *settings])
    # The claim may have had other settings when the folder was made.
    if settings_file.exists() and settings_file.read_text(encoding="utf-8") != settings_text:
        raise UsageError(f"{run_dir}: contains a run of other settings; delete the folder")
    if not path.exists() or json.loads(path.read_text(encoding="utf-8")).get("error"):
        program, *arguments = command_line(command, run_dir, settings, root)
        if command != "peers":
            program = sys.executable
            arguments.append("report=false")
        if command in {"train", "ptq", "real"}:
            arguments.append("resume=auto")
        path.parent.mkdir(parents=True, exist_ok=True)
        settings_file.write_text(settings_text, encoding="utf-8")
        log_file = path.parent.parent / f"{path.parent.name}.log"
        with log_file.open("ab") as output:
            subprocess.run(
                [program, *arguments],
                cwd=ROOT,
                check=True,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
            )
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results
