"""Gather the jobs below a directory: what each was given, what came of it, and the mean over seeds of those that differ in nothing else."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from qat.errors import UsageError
from qat.utils.bounds import json_object, read_yaml
from qat.utils.files import csv_text, write_text
from qat.utils.text import leaves

JOBS, GROUPS = "sweep.csv", "sweep_groups.csv"
# What is averaged over the jobs of a group, in the order of the columns.
MEASURES = ("top1", "top5", "loss", "val_top1", "size_bytes", "wall_seconds")
PERCENTS, LARGEST = ("top1", "top5", "val_top1"), 1e15
# They make no job another experiment; seeds are what is averaged over.
IGNORED = {"seed", "run_dir", "resume", "overwrite", "report", "sweep_dir"}
STATUSES, DAMAGED = ("done", "failed", "damaged", "not finished"), "results.json is damaged"
UNFINISHED = "no results.json: killed, or still going"


@dataclass(frozen=True)
class Job:
    """One directory of a job, read.

    Attributes:
        name: its directory below that of the sweep.
        overrides: settings of the command line, by name, as text.
        results: of `results.json`, empty where there is none.
        trouble: why its numbers do not count; None if they do.
        command: train, ptq, analyze, eval; None where nobody wrote it down.
    """

    name: str
    overrides: Mapping[str, str]
    results: Mapping[str, Any]
    trouble: str | None
    command: str | None = None

    @property
    def setting(self) -> dict[str, str]:
        """What makes it another experiment: the overrides without seed and directories."""
        return {key: value for key, value in self.overrides.items() if key not in IGNORED and not key.startswith("hydra.")}

    @property
    def status(self) -> str:
        """One of `STATUSES`."""
        if self.trouble is None:
            return "done"
        return "failed" if self.results.get("error") else "damaged" if self.trouble.startswith(DAMAGED) else "not finished"


@dataclass(frozen=True)
class Statistic:
    """Of the known values of a group: arithmetic mean, and sample standard deviation (n - 1), None for fewer than two."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Group:
    """Jobs that differ in nothing but their seed.

    Attributes:
        setting: the overrides that differ between groups; one that a group does not have is missing.
        jobs: all of them.
    """

    setting: Mapping[str, str]
    jobs: list[Job]

    @property
    def done(self) -> list[Job]:
        """Those whose numbers count."""
        return [job for job in self.jobs if job.trouble is None]

    def values(self, measure: str) -> list[float]:
        """The known numbers of one measure."""
        return [float(value) for job in self.done if _is_number(value := job.results.get(measure))]

    def statistic(self, measure: str) -> Statistic | None:
        """Mean and deviation; None where nothing is known."""
        known = self.values(measure)
        if not known:
            return None
        return Statistic(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class Sweep:
    """All jobs below a directory.

    Attributes:
        command: of the sweep as it was typed, None where nobody knows.
    """

    folder: Path
    jobs: list[Job]
    command: list[str] | None = None

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The jobs by what they were given, in the order in which the first of each comes."""
        return _grouped(self.jobs)

    @property
    def troubled(self) -> list[Job]:
        """Jobs that failed, or have not finished."""
        return [job for job in self.jobs if job.trouble is not None]

    @property
    def varied(self) -> list[str]:
        """Names of the settings by which groups differ."""
        return list(dict.fromkeys(key for group in self.groups for key in group.setting))

    @property
    def measures(self) -> list[str]:
        """Those of `MEASURES` that a job has."""
        return [name for name in MEASURES if any(group.values(name) for group in self.groups)]

    @property
    def best(self) -> Group | None:
        """The group with the highest mean validation top-1: the test split chooses nothing. None where there is nothing to choose."""
        known = [(found.mean, group) for group in self.groups if (found := group.statistic("val_top1")) is not None]
        return max(known, key=lambda pair: pair[0])[1] if len(known) > 1 else None

    def alike(self, group: Group) -> list[Group]:
        """Groups whose validation top-1 lies within one standard deviation of theirs and one of `group`'s: seeds may have decided."""
        own = group.statistic("val_top1")
        others = [(one, found) for one in self.groups if one is not group and (found := one.statistic("val_top1")) is not None]
        return [one for one, found in others if own and own.mean - found.mean <= (own.std or 0) + (found.std or 0)]

    @property
    def counted(self) -> str:
        """How many jobs, and what became of them."""
        found = Counter(job.status for job in self.jobs)
        return f"{len(self.jobs)} jobs: {', '.join(f'{found[one]} {one}' for one in STATUSES if found[one])}"


def gather(folder: Path) -> Sweep:
    """Read all jobs below a directory, nested ones too; those without results as well."""
    jobs = [_job(folder, path) for path in sorted(_job_folders(folder), key=lambda path: _in_order(str(path.relative_to(folder))))]
    return Sweep(folder, _without_accuracy(jobs), _command(folder))


def read_sweep(folder: Path) -> Sweep:
    """Read the jobs below a directory that somebody names.

    Raises:
        UsageError: it is no directory, is a run itself, or holds no jobs with results.
    """
    if not folder.is_dir():
        raise UsageError(f"sweep={str(folder)!r}: no such folder")
    if (folder / "results.json").is_file():
        raise UsageError(f"sweep={str(folder)!r}: is a run itself; run={folder} makes its report, and a sweep is the folder above its jobs")
    sweep = gather(folder)
    if not any(job.results or job.status == "damaged" for job in sweep.jobs):
        raise UsageError(f"sweep={str(folder)!r}: there is no results.json below it; must be the folder of a sweep, or of several runs")
    return sweep


def write_tables(sweep: Sweep) -> None:
    """Write `sweep.csv`, a row for each job with all its keys, and `sweep_groups.csv`, a row for each group."""
    write_text(sweep.folder / JOBS, csv_text([_job_row(job) for job in sweep.jobs]))
    write_text(sweep.folder / GROUPS, csv_text([_group_row(group, sweep.measures) for group in sweep.groups]))


def _job_row(job: Job) -> dict[str, Any]:
    """A job as one row: its overrides as `overrides.NAME`, then all scalars of `results.json`, nested ones by their path."""
    own = {"job": job.name, "status": job.status, "error": job.trouble}
    found = [(".".join(path), value) for path, value in leaves(job.results) if path != ("error",)]
    results = {name: json.dumps(value) if isinstance(value, list) else value for name, value in found}
    return own | {f"overrides.{key}": value for key, value in job.overrides.items()} | results


def _group_row(group: Group, measures: Sequence[str]) -> dict[str, Any]:
    """A group as one row: its setting, how many jobs count of how many, their seeds, mean and deviation of each measure."""
    seeds = " ".join(str(job.results.get("seed")) for job in group.done)
    row: dict[str, Any] = {**group.setting, "n": len(group.done), "jobs": len(group.jobs), "seeds": seeds}
    for name in measures:
        found = group.statistic(name)
        row |= {f"{name}_mean": found and found.mean, f"{name}_std": found and found.std}
    return row


def overrides_of(folder: Path) -> dict[str, str]:
    """What a job was given on the command line, by name; empty where nobody wrote it down.

    The run itself wrote the first file, once it had begun; Hydra writes the second at each start, also of a job that is refused there.
    """
    for name, key in (("command.json", "overrides"), (".hydra/overrides.yaml", None)):
        try:
            found, _ = read_yaml(folder / name)
        except (OSError, ValueError):
            continue
        listed = found.get(key) if key and isinstance(found, dict) else found
        if isinstance(listed, list):
            return pairs([str(one) for one in listed])
    return {}


def pairs(overrides: Sequence[str]) -> dict[str, str]:
    """Arguments `+key=value` as values by key."""
    parts = (one.partition("=") for one in overrides)
    return {left.lstrip("+~"): right for left, _, right in parts}


def _job_folders(folder: Path) -> Iterator[Path]:
    """Directories in which a job began; links are not followed."""
    for at, folders, files in os.walk(folder):
        if Path(at) != folder and ("results.json" in files or (Path(at) / ".hydra" / "overrides.yaml").is_file()):
            yield Path(at)
        folders[:] = [name for name in folders if not name.startswith(".") and name != "checkpoints"]


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """For sorting: numbers in a name count as such, 2 before 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _job(folder: Path, path: Path) -> Job:
    results = json_object(path / "results.json")
    is_there = (path / "results.json").is_file()
    trouble = None if results else DAMAGED if is_there else UNFINISHED
    if (wrong := _wrong_number(results)) is not None:
        trouble, results = f"{DAMAGED}: {wrong}", {}
    if results.get("error"):
        trouble = " ".join(str(results["error"]).split())
    known = overrides_of(path) or {key: str(results[key]) for key in ("command", "model", "quant", "data", "seed") if results.get(key)}
    command = results.get("command") or str(json_object(path / "command.json").get("command", "")).removesuffix(".py")
    return Job(str(path.relative_to(folder)), known, results, trouble, command or None)


def _wrong_number(results: Mapping[str, Any]) -> str | None:
    """What no run writes as a measure or a seed; NaN is one that is not known."""
    for name in MEASURES:
        value = results.get(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if not _is_number(value) or not 0 <= value <= (100 if name in PERCENTS else LARGEST):
            return f"{name}={str(value)[:40]}"
    seed = results.get("seed")
    return None if seed is None or isinstance(seed, int | str) else f"seed={str(seed)[:40]}"


def _without_accuracy(jobs: list[Job]) -> list[Job]:
    """Where jobs have an accuracy, one that ended without any does not count."""
    if not any(_is_number(job.results.get("top1")) for job in jobs):
        return jobs
    none = "its results.json has no accuracy"
    return [job if job.trouble or _is_number(job.results.get("top1")) else dataclasses.replace(job, trouble=none) for job in jobs]


def _grouped(jobs: Sequence[Job]) -> list[Group]:
    """Jobs by setting; the command is part of it where there are several."""
    has_several = len({job.command for job in jobs if job.command}) > 1
    settings = [({"command": job.command} if has_several and job.command else {}) | job.setting for job in jobs]
    names = dict.fromkeys(name for setting in settings for name in setting)
    varied = [name for name in names if len({setting.get(name) for setting in settings}) > 1]
    found: dict[tuple[str | None, ...], Group] = {}
    for job, setting in zip(jobs, settings, strict=True):
        group = Group({name: setting[name] for name in varied if name in setting}, [])
        found.setdefault(tuple(setting.get(name) for name in varied), group).jobs.append(job)
    return list(found.values())


def _command(folder: Path) -> list[str] | None:
    """Arguments of a sweep, as Hydra wrote them down."""
    try:
        found = read_yaml(folder / "multirun.yaml")[0]["hydra"]
        of_hydra = [one for one in found["overrides"]["hydra"] if one != "hydra.mode=MULTIRUN"]
        return [f"{found['job']['name']}.py", "-m", *found["overrides"]["task"], *of_hydra]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
