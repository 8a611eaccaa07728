"""`python -m evidence.lemma`: quantization error by step size, for uniform and normal weights.

The error is measured on samples, and computed by the formulas of KURE's supplement (arXiv
2002.07686). The script writes evidence/pages/figures/kure-lemma.svg and prints
evidence/logs/kure-lemma.log.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from scipy import optimize

from evidence.claims.arms import ROOT
from evidence.pages.drawing import STYLE, for_dark_pages
from evidence.pages.page import PAGES
from evidence.speed.timing import table
from qat.analysis.analysis import PALETTE, panels
from qat.utils.files import write_text

FIGURE = ROOT / PAGES / "figures" / "kure-lemma.svg"
BITS = (2, 3, 4)
RATIOS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
SAMPLES = 1_000_000
# Both distributions have a variance of 1.
UNIFORM_END = math.sqrt(3)


def uniform_error(step: float, bits: int) -> float:
    """Mean squared error for uniform weights by the paper's formula.

    Args:
        step: step size; levels are multiples of it, up to `2 ** (bits - 1)` steps from zero.
        bits: bit-width, M in the formula.
    """
    end = 2 ** (bits - 1) * step
    if end >= UNIFORM_END:
        return step**2 / 12
    clipped = (UNIFORM_END - end) ** 3 / (3 * UNIFORM_END)
    return clipped + 2**bits * step**3 / (24 * UNIFORM_END)


def normal_error(step: float, bits: int) -> float:
    """Mean squared error for normal weights by the paper's formula (see `uniform_error`)."""
    end = 2 ** (bits - 1) * step
    clipped = (end**2 + 1) * (1 - math.erf(end / math.sqrt(2)))
    tail = math.sqrt(2 / math.pi) * end * math.exp(-(end**2) / 2)
    return clipped + end**2 / (3 * 4**bits) - tail


def measured_error(weights: np.ndarray, step: float, bits: int) -> float:
    """Mean squared error of quantized samples."""
    last = 2 ** (bits - 1)
    codes = np.clip(np.round(weights / step), -last, last)
    return float(np.square(codes * step - weights).mean())


def best_step(error: Callable[[float, int], float], bits: int) -> float:
    """The step size with the least error according to a formula."""
    result = optimize.minimize_scalar(
        lambda step: error(step, bits), bounds=(0.001, 4.0), method="bounded"
    )
    return float(result.x)


def _panel(axis: Axes, bits: int, samples: dict[str, np.ndarray]) -> None:
    axis.set(title=f"{bits} bits", xlabel="step size, times the best", yscale="log")
    for number, (name, weights) in enumerate(samples.items()):
        error = FORMULAS[name]
        best = best_step(error, bits)
        fine = np.linspace(RATIOS[0], RATIOS[-1], 61)
        formula = [error(ratio * best, bits) for ratio in fine]
        axis.plot(fine, formula, color=PALETTE[number], label=f"{name}, formula")
        measured = [measured_error(weights, ratio * best, bits) for ratio in RATIOS]
        axis.plot(
            RATIOS,
            measured,
            "os"[number],
            color=PALETTE[number],
            label=f"{name}, {SAMPLES:,} weights",
        )


FORMULAS = {"uniform": uniform_error, "normal": normal_error}


def main() -> None:
    """Write the figure and print the table."""
    generator = np.random.default_rng(0)
    samples = {
        "uniform": generator.uniform(-UNIFORM_END, UNIFORM_END, SAMPLES),
        "normal": generator.standard_normal(SAMPLES),
    }
    with mpl.rc_context(mpl.rcParamsDefault | STYLE):
        figure, axes = panels(1, len(BITS), height=3.4)
        for axis, bits in zip(axes, BITS, strict=True):
            _panel(axis, bits, samples)
        axes[0].set_ylabel("mean squared error, variance 1")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=8, frameon=False)
        figure.savefig(FIGURE, transparent=True, metadata={"Date": None, "Creator": None})
    write_text(FIGURE, for_dark_pages(FIGURE.read_text(encoding="utf-8")))

    rows = []
    for bits in BITS:
        for name, weights in samples.items():
            error = FORMULAS[name]
            best = best_step(error, bits)
            least = error(best, bits)
            row = [f"{name}, {bits} bits", f"{best:.4f}", f"{least:.5f}"]
            row.append(f"{measured_error(weights, best, bits):.5f}")
            row.append(f"{-10 * math.log10(least):.2f}")
            for ratio in (0.8, 1.2):
                growth = error(ratio * best, bits) - least
                row.append(f"{growth:.5f} ({error(ratio * best, bits) / least:.2f} times)")
            rows.append(row)
    head = ["weights, variance 1", "best step size", "error, formula", "measured", "SNR in dB"]
    head += ["more error at 0.8 times the step", "at 1.2 times"]
    sys.stdout.write(table(head, rows) + "\n")


if __name__ == "__main__":
    main()
