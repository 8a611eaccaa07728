"""What a training run left behind of its oscillations: the log, and what the callbacks wrote into the checkpoint."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.analysis.analysis import StudiedNet
from qat.errors import UsageError
from qat.utils.bounds import read_yaml
from qat.utils.files import csv_rows

SHARE, BAND, FREQUENCY, FLIPS = "osc/share", "osc/band", "osc/frequency", "osc/flips"
FROZEN, TRAINABLE = "freeze/frozen", "cga/trainable"
TOTALS = (SHARE, BAND, FREQUENCY, FLIPS, FROZEN, TRAINABLE)
# What the callback takes when a config does not say otherwise.
_THRESHOLD = 0.005


@dataclass(frozen=True)
class Series:
    """A logged figure over optimizer steps."""

    steps: Sequence[int] = ()
    values: Sequence[float] = ()


@dataclass(frozen=True)
class LayerState:
    """One tensor at the time of the checkpoint.

    Attributes:
        layer: path of its module.
        frequency: of every weight, flat; in [0, 1].
        flips: so far; None where they were not counted.
        frozen: share of weights that iterative freezing holds; None without it.
    """

    layer: str
    frequency: Tensor
    flips: int | None
    frozen: float | None = None

    def share(self, threshold: float) -> float:
        """Share of weights whose frequency is above the threshold."""
        return float((self.frequency > threshold).sum()) / self.frequency.numel()


@dataclass(frozen=True)
class OscillationRun:
    """A run.

    Attributes:
        label: of the net.
        totals: by column of the log, over all weights.
        layers: by layer, the share of its weights that oscillate.
        now: tensors at the time of the checkpoint.
        step: optimizer steps that the checkpoint is from.
        threshold: a weight oscillates if its frequency is above it.
    """

    label: str
    totals: Mapping[str, Series]
    layers: Mapping[str, Series]
    now: Sequence[LayerState] = field(default=(), repr=False)
    step: int | None = None
    threshold: float = _THRESHOLD

    @property
    def frozen(self) -> Series:
        """Share of weights that are held: by freezing, or by annealing, which lets the others move."""
        if FROZEN in self.totals:
            return self.totals[FROZEN]
        free = self.totals.get(TRAINABLE, Series())
        return Series(free.steps, [1 - value for value in free.values])


def read_run(studied: StudiedNet) -> OscillationRun:
    """The run that a checkpoint is of.

    Raises:
        UsageError: the net is of no file, or its run tracked no oscillations.
    """
    if studied.path is None:
        raise UsageError("ckpt=None: oscillation is read from the run of a checkpoint; must be a file such as RUN/checkpoints/best.ckpt")
    folder = run_folder(studied.path)
    settings = _settings(folder)
    content = _content(studied.path)
    now = _tracked(content.get("callbacks") or {})
    totals, layers = _logged(folder / "metrics.csv")
    if SHARE not in totals and not now:
        raise UsageError(
            f"ckpt={str(studied.path)!r}: its run tracked no oscillation; train with callbacks=[default,oscillation], in the same run_dir"
        )
    step = content.get("global_step")
    threshold = float((settings.get("oscillation") or {}).get("threshold", _THRESHOLD))
    return OscillationRun(studied.label, totals, layers, now, step if isinstance(step, int) else None, threshold)


def run_folder(path: Path) -> Path:
    """The run directory that a checkpoint lies in: its own folder, or the one above `checkpoints`."""
    folder = path.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


def _settings(folder: Path) -> dict[str, Any]:
    """The callbacks of the run's config; nothing where there is none that can be read."""
    try:
        found, _ = read_yaml(folder / "config.yaml")
    except (OSError, ValueError):
        return {}
    callbacks = found.get("callbacks") if isinstance(found, dict) else None
    return callbacks if isinstance(callbacks, dict) else {}


def _content(path: Path) -> dict[str, Any]:
    """A checkpoint of Lightning as it is; nothing for another file, which has no callbacks."""
    if path.suffix == ".safetensors":
        return {}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError):
        return {}
    return content if isinstance(content, dict) and "pytorch-lightning_version" in content else {}


def _tracked(callbacks: Mapping[str, Any]) -> list[LayerState]:
    """What the tracker knew, else what iterative freezing did."""
    states = {name.partition("{")[0]: state for name, state in callbacks.items() if isinstance(state, Mapping)}
    freezing = states.get("IterativeFreezing", {})
    held = {name: float(state["frozen"].float().mean()) for name, state in freezing.get("frozen", {}).items()}
    weights = states.get("Oscillation", {}).get("weights", {})
    if weights:
        frequencies = {name: state["frequency"] for name, state in weights.items() if "frequency" in state}
        return [LayerState(_layer(n), f.flatten(), int(weights[n]["flips"]), held.get(n)) for n, f in frequencies.items()]
    return [LayerState(_layer(n), s["frequency"].flatten(), None, held.get(n)) for n, s in freezing.get("codes", {}).items()]


def _layer(site: str) -> str:
    return site.rpartition(".")[0]


def _logged(path: Path) -> tuple[dict[str, Series], dict[str, Series]]:
    """Figures over all weights, and the share by layer; lines of other things are skipped."""
    found: dict[str, list[tuple[int, float]]] = {}
    rows = [row for row in csv_rows(path) if row.get("step")] if path.is_file() else []
    columns = [name for name in (rows[0] if rows else ()) if name in TOTALS or name.startswith(f"{SHARE}/")]
    for row, column in itertools.product(rows, columns):
        if row[column]:
            found.setdefault(column, []).append((int(float(row["step"])), float(row[column])))
    series = {name: _series(points) for name, points in found.items()}
    layers = {name.removeprefix(f"{SHARE}/"): values for name, values in series.items() if name.startswith(f"{SHARE}/")}
    return {name: values for name, values in series.items() if name in TOTALS}, layers


def _series(points: Sequence[tuple[int, float]]) -> Series:
    """In the order of steps; of a step that was logged twice, by a run that was resumed, the later line."""
    by_step = {step: value for step, value in points if not math.isnan(value)}
    steps = sorted(by_step)
    return Series(steps, [by_step[step] for step in steps])


def per_step(series: Series) -> Series:
    """Increase a step of a figure that counts up, at the later of two lines."""
    pairs = zip(series.steps, series.values, series.steps[1:], series.values[1:], strict=False)
    found = [(b, max(later - earlier, 0.0) / (b - a)) for a, earlier, b, later in pairs]
    return Series([step for step, _ in found], [value for _, value in found])
