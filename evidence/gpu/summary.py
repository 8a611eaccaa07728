"""Test top-1 of the runs on CIFAR-10: mean and standard deviation of each variant, differences between runs of one seed."""

from __future__ import annotations

import math
import statistics

from evidence.gpu.plan import PAIRS
from evidence.gpu.records import Row
from evidence.timing import table

# 97.5 % quantiles of Student's t, by degrees of freedom from 1.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values: list[float]) -> str:
    """Mean and the half-width of its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    return f"{mean:+.2f} ± {T[min(len(values) - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def _variants(finished: dict[tuple[str, int], Row]) -> str:
    lines = []
    for variant in dict.fromkeys(variant for variant, _ in finished):
        rows = [row for (name, _), row in finished.items() if name == variant]
        cells = []
        for key in ("test", "val"):
            values = [row[key] for row in rows]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append([variant, str(len(rows)), *cells])
    return table(["variant", "seeds", "test top-1 ± std", "validation"], lines)


def _pairs(finished: dict[tuple[str, int], Row]) -> str:
    lines = []
    for one, other in PAIRS:
        seeds = [seed for name, seed in finished if name == one and (other, seed) in finished]
        if seeds:
            found = [interval([finished[one, s][key] - finished[other, s][key] for s in seeds]) for key in ("test", "val")]
            lines.append([f"{one} - {other}", str(len(seeds)), *found])
    return table(["difference", "pairs", "test ± 95 %", "validation"], lines)


def text(rows: list[Row]) -> str:
    """Markdown of all rows."""
    finished = {(row["variant"], row["seed"]): row for row in rows if "test" in row}
    seconds: dict[str, list[float]] = {}
    for row in rows:
        if "seconds" in row:
            seconds.setdefault(row["variant"], []).append(row["seconds"])
    lost = [row for row in rows if "failed" in row and (row["variant"], row["seed"]) not in finished]
    failed = [f"{row['variant']} seed{row['seed']}: {row['failed']}" for row in lost]
    under_way = f"seconds an epoch: {', '.join(f'{name} {statistics.median(s):.1f}' for name, s in seconds.items())}"
    return "\n\n".join([under_way, _variants(finished), _pairs(finished), *failed])
