"""Metrics, curves and maps in the files of a run, for its record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import qat
from qat.functional import kurtoses
from qat.losses.weights import latent_weights
from qat.utils.files import csv_rows

# Entries of results.json that are metrics.
METRICS = ("top1", "top5", "loss", "val_top1", "top1_fp", "size_bytes", "wall_seconds")
REAL_METRICS = ("top1_float_probe", "cosine")
SEARCH_METRICS = ("fitness_before", "fitness", "evaluations")
# For each curve, the columns of metrics.csv for x and y, and the factor on y.
CURVES = {
    "val_top1": ("epoch", "val/top1", 1),
    "osc_share": ("step", "osc/share", 100),
    "osc_band": ("step", "osc/band", 100),
}
# A longer curve is thinned to at least this many points, and less than twice as many.
POINTS = 60
Curves = dict[str, list[list[float]]]


def read_measurements(
    command: str, results: Mapping[str, Any], run_dir: Path
) -> tuple[dict[str, float], Curves, dict[str, Any]]:
    """Read metrics, curves and maps of a finished command.

    Args:
        command: train, ptq, analyze, eval, peers or real.
        results: content of `results.json`.
        run_dir: folder of the command's files.
    """
    metrics = {key: results[key] for key in METRICS if isinstance(results.get(key), int | float)}
    if command in {"train", "peers"}:
        metrics |= _oscillation(run_dir)
        metrics |= _kurtosis(run_dir)
        return metrics, _curves(run_dir), {}
    if command == "analyze":
        (summary,) = [value for value in results["summary"].values() if isinstance(value, dict)]
        return dict(_numbers(summary)), _robustness(run_dir), _landscape(run_dir)
    if command == "real":
        metrics |= {key: results[key] for key in REAL_METRICS if key in results}
        return metrics, results.get("curves", {}), {}
    search = results.get("search") or {}
    metrics |= {key: search[key] for key in SEARCH_METRICS if key in search}
    return metrics, {}, {}


def _rows(path: Path) -> list[dict[str, str]]:
    return csv_rows(path) if path.exists() else []


def _oscillation(run_dir: Path) -> dict[str, float]:
    """Percentage of oscillating weights among the weights with few bits, and flips per weight."""
    rows = _rows(run_dir / "oscillation.csv")
    if not rows:
        return {}
    total = rows[-1]
    weights = float(total["weights"])
    return {
        "oscillating": 100 * float(total["oscillating"]) / weights,
        "in_band": 100 * float(total["in_band"]) / weights,
        "flips": float(total["flips"]) / weights,
    }


def _kurtosis(run_dir: Path) -> dict[str, float]:
    """Kurtoses of the final weights in layers that KURE regularizes; empty for other libraries."""
    path = run_dir / "checkpoints" / "last.ckpt"
    if not path.exists():
        return {}
    net = qat.load(path)
    with torch.no_grad():
        values = kurtoses(latent_weights(net))
    return {
        "kurtosis": values.mean().item(),
        "kurtosis_lowest": values.min().item(),
        "kurtosis_highest": values.max().item(),
    }


def _curves(run_dir: Path) -> Curves:
    rows = _rows(run_dir / "metrics.csv")
    curves: Curves = {}
    for name, (x, y, factor) in CURVES.items():
        points = []
        for row in rows:
            if row.get(x) and row.get(y):
                points.append([int(float(row[x])), factor * float(row[y])])
        if points:
            stride = max(1, len(points) // POINTS)
            curves[name] = points[::-1][::stride][::-1]  # includes the last point
    return curves


def _numbers(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in summary.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _robustness(run_dir: Path) -> Curves:
    curves: Curves = {}
    for row in _rows(run_dir / "robustness.csv"):
        part = row["part"]
        column = "ratio" if part == "steps" else part
        x = row.get(column)
        if x:
            curves.setdefault(part, []).append([float(x), float(row["top-1 (%)"])])
    return curves


def _landscape(run_dir: Path) -> dict[str, Any]:
    rows = _rows(run_dir / "landscape.csv")
    if not rows:
        return {}
    losses = {}
    for row in rows:
        losses[float(row["x"]), float(row["y"])] = float(row.get("infonce") or row["loss"])
    xs = sorted({x for x, _ in losses})
    ys = sorted({y for _, y in losses})
    heights = []
    for y in ys:
        heights.append([losses[x, y] for x in xs])
    return {"loss": {"x": xs, "y": ys, "z": heights}}
