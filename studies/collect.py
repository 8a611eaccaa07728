"""What is kept of a run: its figures, its curves, where and with what it was made."""

from __future__ import annotations

import csv
import datetime
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import qat
from benchmarks.timing import machine as processor
from qat.functional import kurtoses
from qat.losses.latent_weights import find_latent_weights
from studies.claims import Arm
from studies.records import Record, write_record

FIGURES = ("top1", "top5", "loss", "val_top1", "top1_fp", "size_bytes", "wall_seconds")
FIGURES += ("step_seconds", "step_cpu_seconds", "saved_mb", "peak_rss_mb")  # of studies.peers alone
SEARCH = ("fitness_before", "fitness", "evaluations", "images")
# Those of the tracker, conf/callbacks/oscillation.yaml.
MOMENTUM, THRESHOLD = 0.01, 0.005
CURVES = {"val_top1": ("epoch", "val/top1", 1), "osc_share": ("step", "osc/share", 100), "osc_band": ("step", "osc/band", 100)}
POINTS = 60


class Done(NamedTuple):
    """A command that has run: its `results.json`, its directory, its name, how it was called."""

    results: dict[str, Any]
    place: Path
    name: str
    command: str


def collect(arm: Arm, seed: int, done: Done, further: Mapping[str, Done], starts: Mapping[str, str], path: Path) -> None:
    """Write the record of a run, atomically."""
    metrics, curves, maps = _of_command(done)
    for name, one in further.items():
        own = _of_command(one)
        if by_width := re.fullmatch(r"w(\d+)_(\w+)", name):
            curves.setdefault(by_width[2], []).append([int(by_width[1]), own[0]["top1"]])
        for whole, part in zip((metrics, curves, maps), own, strict=True):
            whole |= {f"{name}.{key}": value for key, value in part.items()}
    results = done.results
    record = Record(
        claim=arm.claim,
        arm=arm.name,
        seed=seed,
        command=done.command,
        further_commands={name: one.command for name, one in further.items()},
        starts=starts,
        metrics=metrics,
        curves=curves,
        maps=maps,
        wall_seconds=round(sum(one.results.get("wall_seconds") or 0 for one in (done, *further.values())), 1),
        machine=machine(),
        device=results["device"],
        versions=results["versions"],
        git_commit=results.get("git_commit"),
        date=datetime.date.today().isoformat(),
        format=2,
    )
    write_record(path, record)


def machine() -> str:
    """Processor and cores, or the accelerator."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"


def _of_command(done: Done) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    results, place, command, _ = done
    metrics = {key: results[key] for key in FIGURES if isinstance(results.get(key), int | float)}
    if command in {"train", "peers"}:
        return metrics | _oscillation(place) | _kurtosis(place), _curves(place), {}
    if command == "ptq":
        search = results.get("search") or {}
        return metrics | {key: search[key] for key in SEARCH if key in search}, {}, {}
    if command == "analyze":
        return _analysis(results, place)
    return metrics, {}, {}


def _oscillation(place: Path) -> dict[str, float]:
    """Percent of the weights that have a quantizer of few bits, and flips by weight; of all, and of queries and keys."""
    path = place / "oscillation.csv"
    if not path.exists():
        return {}
    *_, total = csv.DictReader(path.open(encoding="utf-8"))
    weights = float(total["weights"])
    found = {key: 100 * float(total[key]) / weights for key in ("oscillating", "in_band")} | {"flips": float(total["flips"]) / weights}
    shares = [share for share in (_of_queries_and_keys(name, state) for name, state in _tracked(place).items()) if share is not None]
    return found | ({"qk.oscillating": 100 * torch.cat(shares).float().mean().item()} if shares else {})


def _tracked(place: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What the tracker of a run saw, by quantizer."""
    callbacks = torch.load(place / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    return next((state["weights"] for name, state in callbacks.items() if name.startswith("Oscillation")), {})


def _of_queries_and_keys(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Which of them oscillate, flat: entries of the folded matrix, or of the first two thirds of the joint projection."""
    frequency = state["frequency"]
    if name.endswith(".qk_quantizer"):
        return (frequency > THRESHOLD).flatten()
    if ".attn.qkv." in f"{name}.":
        return (frequency[: 2 * len(frequency) // 3] > THRESHOLD).flatten()
    return None


def _kurtosis(place: Path) -> dict[str, float]:
    """Of the layers that the term acts on, in the last weights; nothing for a net that is not ours."""
    path = place / "checkpoints" / "last.ckpt"
    if not path.exists():
        return {}
    net = qat.load(path)
    with torch.no_grad():
        found = kurtoses(master.of(net) for master in find_latent_weights(net, "loss.kure"))
    return {"kurtosis": found.mean().item(), "kurtosis_lowest": found.min().item(), "kurtosis_highest": found.max().item()}


def _curves(place: Path) -> dict[str, Any]:
    path = place / "metrics.csv"
    if not path.exists():
        return {}
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    made = {}
    for name, (x, y, factor) in CURVES.items():
        points = [[int(float(row[x])), factor * float(row[y])] for row in rows if row.get(x) and row.get(y)]
        if points:
            stride = max(1, len(points) // POINTS)
            made[name] = points[::-1][::stride][::-1]  # about so many of them, the last among them
    return made


def _analysis(results: dict[str, Any], place: Path) -> tuple[dict[str, float], dict[str, Any], dict[str, Any]]:
    (summary,) = [value for value in results["summary"].values() if isinstance(value, dict)]
    reader = READERS.get(results["analysis"])
    curves, maps = reader(place) if reader else ({}, {})
    return dict(_numbers(summary)), curves, maps


def _numbers(found: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _robustness(place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found: dict[str, Any] = {}
    for row in csv.DictReader((place / "robustness.csv").open(encoding="utf-8")):
        x = {"steps": "ratio", "bits": "bits"}.get(row["part"])
        if x is not None:
            found.setdefault(row["part"], []).append([float(row[x]), float(row["top-1 (%)"])])
    return found, {}


def _landscape(place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = list(csv.DictReader((place / "landscape.csv").open(encoding="utf-8")))
    xs, ys = (sorted({float(row[key]) for row in rows}) for key in ("x", "y"))
    column = "infonce" if "infonce" in rows[0] else "loss"  # that is what such an analysis looks at
    at = {(float(row["x"]), float(row["y"])): float(row[column]) for row in rows}
    return {}, {"loss": {"x": xs, "y": ys, "z": [[at[x, y] for x in xs] for y in ys]}}


READERS: dict[str, Callable[[Path], tuple[dict[str, Any], dict[str, Any]]]] = {"robustness": _robustness, "landscape": _landscape}
