"""Short tables of what was measured."""

from __future__ import annotations

import statistics

from evidence.gpu import matmuls
from evidence.gpu.records import Row
from evidence.step_arms import FLOAT
from evidence.timing import table

GIB = 2**30
STEP_HEAD = [
    "arm",
    "mode",
    "ms",
    "x float, same mode",
    "x float, compiled",
    "images/s",
    "host ms",
    "device busy",
    "kernels",
    "GiB",
    "x float",
]
KERNEL_HEAD = ["kernel", "GB/s", "of the copy", "inductor GB/s", "plain ms", "ms", "right", "inductor right"]


def _of(kind: str, rows: dict[str, Row]) -> dict[str, Row]:
    return {name.partition(", ")[2]: row for name, row in rows.items() if name.startswith(f"{kind}, ")}


def _checks(rows: dict[str, Row]) -> str:
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, row["failed"][:100], ""])
            continue
        cells = [f"{kind} {error:.1e} (control {row['control'][kind]:.1e})" for kind, error in row["errors"].items()]
        lines.append([name, "right" if row["right"] else "WRONG", ", ".join(cells)])
    return table(["check", "", "errors"], lines)


def _kernels(rows: dict[str, Row], copy: float | None) -> str:
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, row["failed"][:100], *[""] * 6])
            continue
        share = f"{row['kernel_gb_s'] / copy:.2f}" if copy else ""
        inductor = f"{row['inductor_gb_s']:.0f}" if "inductor_gb_s" in row else ""
        milliseconds = [f"{row['plain_ms']:.3f}", f"{row['kernel_ms']:.3f}"]
        rights = [str(row["kernel_right"]), str(row.get("inductor_right", ""))]
        lines.append([name, f"{row['kernel_gb_s']:.0f}", share, inductor, *milliseconds, *rights])
    return table(KERNEL_HEAD, lines)


def ratio(row: Row, base: Row | None, *, in_turns: bool) -> str:
    """Of times: the median of those within a round, or that of medians where the two were not timed together."""
    if not base or not row.get("ms") or not base.get("ms"):
        return ""
    if not in_turns or row["group"] != base["group"]:
        return f"{statistics.median(row['ms']) / statistics.median(base['ms']):.2f}"
    ratios = [a / b for a, b in zip(row["ms"], base["ms"], strict=False)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def _step(name: str, rows: dict[str, Row]) -> list[str]:
    model, batch, arm, mode = name.split(", ")
    row = rows[name]
    if not row.get("ms"):
        return [arm, mode, row.get("failed", "not timed")[:100], *[""] * 8]
    float_mode = "eager" if mode == "plain" else mode
    same, compiled = (rows.get(f"{model}, {batch}, {FLOAT}, {m}") for m in (float_mode, "compiled"))
    ms, peak = statistics.median(row["ms"]), max(row["peak"])
    ours = [
        f"{ms:.2f}",
        ratio(row, same, in_turns=True),
        ratio(row, compiled, in_turns=mode in {"compiled", "blocks"}),
        f"{1000 * int(batch) / ms:.0f}",
    ]
    busy = [f"{row['busy_ms'] / ms:.2f}", f"{row['kernels']:.0f}"] if row.get("busy_ms") else ["", ""]
    memory = [f"{peak / GIB:.2f}", f"{peak / max(same['peak']):.2f}" if same and any(same.get("peak", ())) else ""] if peak else ["", ""]
    return [arm, mode, *ours, f"{statistics.median(row['host_ms']):.2f}", *busy, *memory]


def text(rows: dict[str, Row]) -> str:
    """Markdown of all rows."""
    machine = rows.get("machine", {})
    parts = [", ".join(f"{key}: {value}" for key, value in machine.items() if key != "name")]
    if checks := _of("check", rows):
        parts.append(_checks(checks))
    if kernels := _of("kernel", rows):
        parts.append(_kernels(kernels, machine.get("copy_gb_s")))
    steps = _of("step", rows)
    for title in dict.fromkeys(name.rsplit(", ", 2)[0] for name in steps):
        lines = [_step(name, steps) for name in steps if name.rsplit(", ", 2)[0] == title]
        parts.append(f"{title} images, bfloat16 autocast\n\n{table(STEP_HEAD, lines)}")
    parts += [f"{name}\n\n{matmuls.report(row)}" for name, row in _of("products", rows).items() if "products" in row]
    return "\n\n".join(parts)
