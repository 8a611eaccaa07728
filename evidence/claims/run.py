"""Runs the arms of claims and writes their records: several at a time, each command in a process; what has a record is not run again."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import qat
from evidence.claims.claim import Arm, load_claims
from evidence.claims.records import Record, add_record, read_records
from evidence.speed.timing import machine
from qat.errors import UsageError
from qat.functional import kurtoses
from qat.losses.weights import latent_weights
from qat.utils.files import csv_rows

log = logging.getLogger("qat.evidence")

ROOT = Path(__file__).resolve().parents[2]
PEERS_PYTHON = "outputs/peers/bin/python"
FIGURES = ("top1", "top5", "loss", "val_top1", "top1_fp", "size_bytes", "wall_seconds")
SEARCH = ("fitness_before", "fitness")
CURVES = {
    "val_top1": ("epoch", "val/top1", 1),
    "osc_share": ("step", "osc/share", 100),
    "osc_band": ("step", "osc/band", 100),
}
POINTS = 60
Run = tuple[Arm, int]


@dataclass(frozen=True)
class Arms:
    """All arms of the claims in a folder, and where their runs are.

    Attributes:
        claims: folder of claim files.
        records: folder of records.
        runs: where runs leave their files; relative to the repository, as it stands in the commands of records.
    """

    claims: Path = ROOT / "evidence" / "claims"
    records: Path = ROOT / "evidence" / "records"
    runs: Path = Path("outputs/evidence")
    by_path: dict[str, Arm] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_path.update({
            arm.path: arm
            for claim in load_claims(self.claims).values()
            for arm in claim.arms.values()
        })
        for arm in self.by_path.values():
            for other in arm.needs():
                if other not in self.by_path:
                    raise UsageError(
                        f"{arm.path} needs {other!r}: must be one of the arms of {self.claims}"
                    )

    def __getitem__(self, path: str) -> Arm:
        return self.by_path[path]

    def ordered(self, wanted: Sequence[str] = ()) -> list[Run]:
        """Runs of claims or arms, `C1` or `C1/statsq_w2`, each after those it needs, first seeds first; nothing wanted = all.

        Raises:
            UsageError: there is no such claim or arm.
        """
        claims = sorted({arm.claim for arm in self.by_path.values()})
        found: dict[tuple[str, int], Run] = {}

        def add(arm: Arm, seed: int) -> None:
            for run in self.needed(arm, seed):
                add(*run)
            found.setdefault((arm.path, seed), (arm, seed))

        for name in wanted or claims:
            chosen = [
                (seed, arm)
                for arm in self.by_path.values()
                if name in {arm.claim, arm.path}
                for seed in arm.seeds
            ]
            if not chosen:
                raise UsageError(
                    f"{name!r}: must be one of {', '.join(claims)}, or an arm of theirs, CLAIM/ARM"
                )
            for seed, arm in sorted(chosen, key=lambda one: one[0]):
                add(arm, seed)
        return list(found.values())

    def needed(self, arm: Arm, seed: int) -> list[Run]:
        """Runs that have to be done first; of an arm with other seeds its first."""
        return [(self[path], _seed_of(self[path], seed)) for path in arm.needs()]

    def run_dir(self, arm: Arm, seed: int) -> Path:
        """Where a run leaves its files."""
        return self.runs / arm.claim / f"{arm.name}-seed{seed}"

    def kept(self, arm: Arm, seed: int) -> Path:
        """Where its weights are kept for others."""
        kept = self.records.parent / "weights" / arm.claim / f"{arm.name}-seed{seed}.pt"
        return kept.relative_to(ROOT) if kept.is_relative_to(ROOT) else kept

    def to_do(self, wanted: Sequence[str] = ()) -> list[Run]:
        """Runs that have no record, and those whose weights one of them needs but which are not here, in the order of `ordered`."""
        records = {(f"{one.claim}/{one.arm}", one.seed): one for one in read_records(self.records)}

        def is_done(arm: Arm, seed: int) -> bool:
            record = records.get((arm.path, seed))
            has_weights = not arm.keep or (ROOT / self.kept(arm, seed)).exists()
            return (
                record is not None
                and set(arm.further) <= set(record.further_commands)
                and has_weights
            )

        runs = self.ordered(wanted)
        chosen = {(arm.path, seed) for arm, seed in runs if not (is_done(arm, seed) or arm.retired)}
        for arm, seed in reversed(runs):
            if (arm.path, seed) in chosen:
                lost = [
                    of.partition("@")[0]
                    for of in arm.sources()
                    if not (ROOT / self.checkpoint(of, seed)).exists()
                ]
                chosen |= {(path, _seed_of(self[path], seed)) for path in lost}
        return [(arm, seed) for arm, seed in runs if (arm.path, seed) in chosen]

    def checkpoint(self, of: str, seed: int) -> Path:
        """File of `CLAIM/arm[@last]`, of this seed or, where the arm has others, of its first."""
        path, _, which = of.partition("@")
        arm, its_seed = self[path], _seed_of(self[path], seed)
        if arm.keep and not which:
            return self.kept(arm, its_seed)
        file = "quantized.ckpt" if arm.command == "ptq" else f"checkpoints/{which or 'best'}.ckpt"
        return self.run_dir(arm, its_seed) / file

    def settings(self, arm: Arm, seed: int) -> list[str]:
        """Overrides of the arm's command, without run_dir and data.root."""
        chosen = [*preset(arm.use), *arm.set]
        if arm.best_of:
            scores = {
                f"{one.claim}/{one.arm}": one.metrics.get("val_top1")
                for one in reversed(read_records(self.records))
            }
            chosen += self[max(arm.best_of, key=lambda path: scores.get(path) or 0.0)].set
        sources = {"ckpt": arm.ckpt, "teacher.ckpt": arm.teacher}
        return [
            *chosen,
            *(f"{key}={self.checkpoint(of, seed)}" for key, of in sources.items() if of),
            f"seed={seed}",
        ]


def _seed_of(arm: Arm, seed: int) -> int:
    return seed if seed in arm.seeds else arm.seeds[0]


def preset(names: Sequence[str]) -> list[str]:
    """Settings of presets, one after the other."""
    presets: dict[str, list[str]] = yaml.safe_load(
        (ROOT / "evidence" / "claims" / "_presets.yaml").read_text(encoding="utf-8")
    )
    return [setting for name in names for setting in presets[name]]


def run_all(wanted: Sequence[str], root: str | None, workers: int, arms: Arms) -> int:
    """Run what has no record yet, each after what it needs, `workers` commands of one thread at a time.

    Returns:
        How many runs failed, or could not start because one that they need failed.
    """
    waiting, failed = arms.to_do(wanted), list[Run]()
    log.info("%d runs to do", len(waiting))
    going: dict[Future[None], Run] = {}
    with ThreadPoolExecutor(workers) as pool:
        while waiting or going:
            to_come = [*waiting, *going.values(), *failed]
            for run in [
                run for run in waiting if not any(needed in to_come for needed in arms.needed(*run))
            ]:
                waiting.remove(run)
                going[pool.submit(run_one, *run, root, arms)] = run
            if not going:
                break
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                arm, seed = going.pop(future)
                error = future.exception()
                failed += [(arm, seed)] if error else []
                log.info(
                    "%s seed %d: %s, %d to go",
                    arm.path,
                    seed,
                    error or "done",
                    len(waiting) + len(going),
                )
    return len(failed) + len(waiting)


def run_one(arm: Arm, seed: int, root: str | None, arms: Arms) -> None:
    """One run, its further commands, its record."""
    place = arms.run_dir(arm, seed)
    todo = [(arm.command, place, arms.settings(arm, seed))]
    for name, one in arm.further.items():
        weights = arms.checkpoint(f"{arm.path}@{one.weights}", seed)
        todo.append((
            one.command,
            place / name,
            [*preset(one.use), *one.set, f"ckpt={weights}", f"seed={seed}"],
        ))
    results = [execute(*one, root) for one in todo]
    if arm.keep:
        (ROOT / arms.kept(arm, seed)).parent.mkdir(parents=True, exist_ok=True)
        qat.save(qat.load(ROOT / place / "checkpoints" / "best.ckpt"), ROOT / arms.kept(arm, seed))

    metrics, curves, maps = figures_of(arm.command, results[0], ROOT / place)
    for name, (command, where, _), found in zip(arm.further, todo[1:], results[1:], strict=True):
        own = figures_of(command, found, ROOT / where)
        if by_width := re.fullmatch(r"w(\d+)_(\w+)", name):
            curves.setdefault(by_width[2], []).append([int(by_width[1]), own[0]["top1"]])
        for whole, part in zip((metrics, curves, maps), own, strict=True):
            whole |= {f"{name}.{key}": value for key, value in part.items()}
    lines = [shlex.join(command_line(*one, "FOLDER" if root else None)) for one in todo]
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
        wall_seconds=round(sum(one.get("wall_seconds") or 0 for one in results), 1),
        machine=f"{machine()}, {os.cpu_count()} cores, 1 thread(s)",
        device=results[0]["device"],
        versions=results[0]["versions"],
        git_commit=results[0].get("git_commit"),
        date=datetime.date.today().isoformat(),
    )
    add_record(arms.records, record)


def command_line(command: str, place: Path, settings: Sequence[str], root: str | None) -> list[str]:
    """What a person types for a run."""
    program = (
        [PEERS_PYTHON, "-m", "evidence.peers"]
        if command == "peers"
        else ["python", f"{command}.py"]
    )
    return [*program, f"run_dir={place}", *([f"data.root={root}"] if root else []), *settings]


def execute(command: str, place: Path, settings: Sequence[str], root: str | None) -> dict[str, Any]:
    """Run a command unless its results are there, what it says goes to `evidence.log`; gives its `results.json`.

    Raises:
        CalledProcessError: it failed.
    """
    path = ROOT / place / "results.json"
    if not path.exists() or json.loads(path.read_text(encoding="utf-8")).get("error"):
        program, *line = command_line(command, place, settings, root)
        if command != "peers":
            program = sys.executable
            line += ["report=false", *(["resume=auto"] if command in {"train", "ptq"} else [])]
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent.parent / f"{path.parent.name}.log").open("ab") as out:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
            subprocess.run(
                [program, *line],
                cwd=ROOT,
                check=True,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
            )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def figures_of(
    command: str, results: Mapping[str, Any], place: Path
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    """Metrics, curves and maps of a command that has run."""
    metrics = {key: results[key] for key in FIGURES if isinstance(results.get(key), int | float)}
    if command in {"train", "peers"}:
        return metrics | _oscillation(place) | _kurtosis(place), _curves(place), {}
    if command == "analyze":
        (summary,) = [value for value in results["summary"].values() if isinstance(value, dict)]
        return dict(_numbers(summary)), _robustness(place), _landscape(place)
    search = results.get("search") or {}
    return metrics | {key: search[key] for key in SEARCH if key in search}, {}, {}


def _rows(path: Path) -> list[dict[str, str]]:
    return csv_rows(path) if path.exists() else []


def _oscillation(place: Path) -> dict[str, float]:
    """Percent of the weights that have a quantizer of few bits, and flips by weight."""
    for total in _rows(place / "oscillation.csv")[-1:]:
        weights = float(total["weights"])
        return {key: 100 * float(total[key]) / weights for key in ("oscillating", "in_band")} | {
            "flips": float(total["flips"]) / weights
        }
    return {}


def _kurtosis(place: Path) -> dict[str, float]:
    """Of the layers that the term acts on, in the last weights; nothing for a net that is not ours."""
    path = place / "checkpoints" / "last.ckpt"
    if not path.exists():
        return {}
    net = qat.load(path)
    with torch.no_grad():
        found = kurtoses(latent_weights(net))
    return {
        "kurtosis": found.mean().item(),
        "kurtosis_lowest": found.min().item(),
        "kurtosis_highest": found.max().item(),
    }


def _curves(place: Path) -> dict[str, Any]:
    rows, made = _rows(place / "metrics.csv"), {}
    for name, (x, y, factor) in CURVES.items():
        points = [
            [int(float(row[x])), factor * float(row[y])]
            for row in rows
            if row.get(x) and row.get(y)
        ]
        if points:
            stride = max(1, len(points) // POINTS)
            made[name] = points[::-1][::stride][::-1]  # about so many of them, the last among them
    return made


def _numbers(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _robustness(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in _rows(place / "robustness.csv"):
        if x := row.get({"steps": "ratio"}.get(row["part"], row["part"])):
            found.setdefault(row["part"], []).append([float(x), float(row["top-1 (%)"])])
    return found


def _landscape(place: Path) -> dict[str, Any]:
    rows = _rows(place / "landscape.csv")
    if not rows:
        return {}
    xs, ys = (sorted({float(row[key]) for row in rows}) for key in ("x", "y"))
    at = {
        (float(row["x"]), float(row["y"])): float(row.get("infonce") or row["loss"]) for row in rows
    }
    return {"loss": {"x": xs, "y": ys, "z": [[at[x, y] for x in xs] for y in ys]}}
