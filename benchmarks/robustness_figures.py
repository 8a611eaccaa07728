"""Draws the figures of docs/robustness.md: closed forms, and with `--runs` what the runs of claim C5 left behind.

Run by `make robustness-figures`.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

import qat
from qat.functional import rounding_noise as noise

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
SQRT3 = math.sqrt(3)
UNIFORM, NORMAL = "C0", "C1"
LAYER = "blocks.3.mlp.fc1.weight"
PULLS = (
    ("without the term", "longer", NORMAL),
    ("mean over layers", "kure", UNIFORM),
    ("sum over layers", "sum", "C3"),
)
mpl.rcParams.update({"svg.hashsalt": "qat", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def uniform_mse(step: float, bits: int) -> float:
    """Of a uniform variable with variance 1."""
    return noise.uniform_mse(step, bits, SQRT3)


def draw_ratios(axis: Axes, bits: int) -> None:
    """Error over the step's ratio to the best one."""
    ratios = np.linspace(0.7, 1.3, 121)
    kinds = (
        ("uniform", UNIFORM, uniform_mse, noise.uniform_best_step(bits, SQRT3)),
        ("normal", NORMAL, noise.normal_mse, noise.normal_best_step(bits)),
    )
    for name, colour, mse, best in kinds:
        axis.plot(ratios, [1e3 * mse(r * best, bits) for r in ratios], color=colour, label=name)
    axis.set(xlabel="step / best step", ylabel="mean squared error, 1e-3 of the variance", ylim=(0, None), title=f"{bits} bits")
    axis.legend()


def draw_snr(axis: Axes) -> None:
    """Signal-to-noise ratio at the best step over the bits."""
    bits = range(2, 9)
    uniform = [noise.snr_db(1, uniform_mse(noise.uniform_best_step(b, SQRT3), b)) for b in bits]
    normal = [noise.snr_db(1, noise.normal_mse(noise.normal_best_step(b), b)) for b in bits]
    for name, colour, values in (("uniform", UNIFORM, uniform), ("normal", NORMAL, normal)):
        axis.plot(bits, values, "o-", color=colour, label=name)
    for b, high, low in zip(bits, uniform, normal, strict=True):
        axis.annotate(f"{high - low:.1f}", (b, high), textcoords="offset points", xytext=(-4, 7), ha="right", fontsize=8)
    axis.set(xlabel="bits", ylabel="signal-to-noise ratio at the best step, dB", title="numbers: gain of uniform, dB", xlim=(1.4, 8.3))
    axis.legend(loc="lower right")


def draw_theory(path: Path) -> None:
    """Two widths over the ratio, and all widths at the best step."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    draw_ratios(axes[0], 2)
    draw_ratios(axes[1], 4)
    draw_snr(axes[2])
    figure.savefig(path, metadata={"Date": None})


def course(run_dir: Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of `metrics.csv`."""
    rows = [row for row in csv.DictReader((run_dir / "metrics.csv").open()) if row.get(column)]
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def draw_runs(runs: Path, path: Path) -> None:
    """Kurtosis over the steps of each seed; the weights of one layer, by how hard they were pulled."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    seeds = sorted(runs.glob("kure-seed*"))
    for seed in seeds:
        for number, (column, name) in enumerate((
            ("kurtosis_max", "highest layer"),
            ("kurtosis_mean", "mean"),
            ("kurtosis_min", "lowest layer"),
        )):
            steps, values = course(seed, f"train/{column}")
            axes[0].plot(steps, values, color=f"C{number}", lw=1, label=name if seed == seeds[0] else None)
    axes[0].axhline(1.8, color="0.5", lw=0.8, ls="--")
    axes[0].set(xlabel="step", ylabel="kurtosis", ylim=(1.5, None))
    axes[0].legend()
    for name, run, colour in PULLS:
        weight = qat.load(runs / f"{run}-seed0" / "checkpoints" / "last.ckpt").get_parameter(LAYER).detach()
        standard = ((weight - weight.mean()) / weight.std()).flatten()
        density, edges = torch.histogram(standard.clamp(-4, 4), bins=60, density=True)
        axes[1].stairs(density.numpy(), edges.numpy(), color=colour, label=name)
    axes[1].set(xlabel=f"{LAYER}, in standard deviations", ylabel="density")
    axes[1].legend(loc="upper right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write the SVG files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder of its runs, outputs/studies/C5")
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_args()
    draw_theory(args.out / "robustness-theory.svg")
    if args.runs:
        draw_runs(args.runs, args.out / "robustness-pull.svg")


if __name__ == "__main__":
    main()
