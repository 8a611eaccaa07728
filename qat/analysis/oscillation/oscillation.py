"""How a net's weights oscillated while it was trained, and which oscillate at the time of the checkpoint. Source: arXiv 2203.11086."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qat.analysis.analysis import Advice, Analysis, Drawing, Outcome, Row, StudiedNet, Table
from qat.analysis.oscillation.drawings import curves, frequencies, layer_map, top_layers
from qat.analysis.oscillation.recorded import BAND, FLIPS, FREQUENCY, SHARE, OscillationRun, read_run
from qat.utils.validate import check_int, check_number

# A layer of which more oscillates is worth a word.
LAYER_SHARE = 0.1
# The share at the end over that at the half of the run, above which oscillation grows as the weights should settle.
GROWTH = 1.1
# Upper ends of the classes of a table of frequencies.
_CLASSES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
_NAMED = 3


@dataclass(frozen=True)
class OscillationAnalysis(Analysis):
    """Curves of the share of oscillating weights, of flips and of frozen weights; layers; frequencies now.

    Read from the run of each checkpoint, which must have had `callbacks=[default,oscillation]` (or `freeze`).

    Attributes:
        threshold: a weight oscillates now if its frequency is above it; None = the threshold of the run.
        top: layers in the picture of those that oscillate most.

    Raises:
        UsageError: a setting cannot work.
    """

    name: ClassVar[str] = "oscillation"
    split: ClassVar[str | None] = None

    threshold: float | None = None
    top: int = 15

    def __post_init__(self) -> None:
        check_int("analysis.top", self.top, 1)
        if self.threshold is not None:
            check_number("analysis.threshold", self.threshold, 0, below=1)

    def outcome(self, nets: Sequence[StudiedNet], rows: Sequence[Row]) -> Outcome:
        """Read the runs.

        Raises:
            UsageError: a run tracked no oscillations.
        """
        runs = [read_run(net) for net in nets]
        if self.threshold is not None:
            runs = [dataclasses.replace(run, threshold=self.threshold) for run in runs]
        return Outcome(
            {run.label: self._summary(run) for run in runs},
            list(self._tables(runs)),
            list(self._drawings(runs)),
            [entry for run in runs for entry in self._advice(run)],
        )

    def _summary(self, run: OscillationRun) -> dict[str, Any]:
        n_weights = sum(state.frequency.numel() for state in run.now)
        oscillating = sum(float((state.frequency > run.threshold).sum()) for state in run.now)
        share = run.totals[SHARE].values if SHARE in run.totals else []
        return {
            "step_of_checkpoint": run.step,
            "threshold": run.threshold,
            "weights": n_weights or None,
            "share_now_percent": 100 * oscillating / n_weights if n_weights else None,
            "share_logged_last_percent": 100 * share[-1] if share else None,
            "share_logged_highest_percent": 100 * max(share) if share else None,
            "flips_logged": run.totals[FLIPS].values[-1] if FLIPS in run.totals else None,
            "frozen_logged_last_percent": 100 * run.frozen.values[-1] if run.frozen.values else None,
        }

    def _tables(self, runs: Sequence[OscillationRun]) -> Iterator[Table]:
        over_time = [row for run in runs for row in _curve_rows(run)]
        if over_time:
            yield Table("oscillation", "Oscillation over the optimizer steps", over_time)
        layers = [row for run in runs for row in self._layer_rows(run)]
        if layers:
            yield Table("oscillation_layers", "Layers at the time of the checkpoint, most oscillating first", layers)
            counts = [row for run in runs if run.now for row in _frequency_rows(run)]
            yield Table("oscillation_frequencies", "Weights by the frequency of their flips, at the time of the checkpoint", counts)

    def _layer_rows(self, run: OscillationRun) -> Iterator[Row]:
        for state in sorted(run.now, key=lambda entry: -entry.share(run.threshold)):
            row: Row = {
                "net": run.label,
                "layer": state.layer,
                "weights": state.frequency.numel(),
                "oscillating, %": round(100 * state.share(run.threshold), 4),
                "mean frequency": float(f"{float(state.frequency.double().mean()):.6g}"),
                "highest frequency": float(f"{float(state.frequency.max()):.6g}"),
            }
            row |= {} if state.flips is None else {"flips so far": state.flips}
            yield row | ({} if state.frozen is None else {"frozen, %": round(100 * state.frozen, 4)})

    def _drawings(self, runs: Sequence[OscillationRun]) -> Iterator[Drawing]:
        if any(run.totals for run in runs):
            yield curves("oscillation_curves", "Oscillation over the training", runs)
        for number, run in enumerate(runs, 1):
            if run.layers:
                suffix = f"_{number}" if len(runs) > 1 else ""
                yield layer_map(f"oscillation_map{suffix}", f"Share of oscillating weights by layer: {run.label}", run)
        if any(run.now for run in runs):
            shares = {run.label: {s.layer: s.share(run.threshold) for s in run.now} for run in runs if run.now}
            yield top_layers("oscillation_top", "Layers that oscillate most, at the time of the checkpoint", shares, self.top)
            yield frequencies("oscillation_frequencies", "How often weights flip, at the time of the checkpoint", runs)

    def _advice(self, run: OscillationRun) -> Iterator[Advice]:
        shares = sorted(((state.share(run.threshold), state.layer) for state in run.now), reverse=True)
        over = [(share, layer) for share, layer in shares if share > LAYER_SHARE]
        if over:
            names = ", ".join(layer for _, layer in over[:_NAMED]) + (f" and {len(over) - _NAMED} more" if len(over) > _NAMED else "")
            yield Advice(f"{run.label}: {names}", f"up to {100 * over[0][0]:.0f} % of the weights of a layer oscillate", _REMEDY)
        growth = _growth(run)
        if growth is not None and growth > GROWTH:
            what = f"the share of oscillating weights grew by {100 * (growth - 1):.0f} % in the second half of the run"
            yield Advice(run.label, what, f"Let the learning rate fall to zero. {_REMEDY}")


_REMEDY = (
    "Anneal at the end (callbacks=[default,cga,oscillation]), freeze what flips (callbacks=[default,freeze,oscillation]), "
    "or dampen (loss=ce_dampening, loss=kd_dampening)."
)


def _growth(run: OscillationRun) -> float | None:
    """Share at the end over that at half of the run; None where there is too little to say."""
    values = run.totals[SHARE].values if SHARE in run.totals else []
    middle = values[len(values) // 2] if values else 0.0
    return values[-1] / middle if len(values) >= 4 and middle > 0 else None


def _curve_rows(run: OscillationRun) -> Iterator[Row]:
    columns = {
        "oscillating, %": (run.totals.get(SHARE), 100),
        "near a threshold, %": (run.totals.get(BAND), 100),
        "mean frequency": (run.totals.get(FREQUENCY), 1),
        "flips so far": (run.totals.get(FLIPS), 1),
        "held, %": (run.frozen, 100),
    }
    by_step: dict[int, Row] = {}
    for name, (series, factor) in columns.items():
        if series is None:
            continue
        for step, value in zip(series.steps, series.values, strict=True):
            by_step.setdefault(step, {})[name] = float(f"{factor * value:.6g}")
    for step in sorted(by_step):
        yield {"net": run.label, "step": step, **by_step[step]}


def _frequency_rows(run: OscillationRun) -> Iterator[Row]:
    # In each class of frequencies: zero, which stands for what is too small to be stored, then up to each upper end.
    classes = [torch.bucketize(state.frequency, torch.tensor(_CLASSES)) for state in run.now]
    counts = torch.stack([torch.bincount(one, minlength=len(_CLASSES))[: len(_CLASSES)] for one in classes]).sum(0).tolist()
    total = sum(counts)
    for upper, count in zip(_CLASSES, counts, strict=True):
        name = f"below {1e-4:g}" if upper == 0 else f"up to {upper:g}"
        yield {"net": run.label, "flips per look": name, "weights": count, "share, %": round(100 * count / total, 4)}
