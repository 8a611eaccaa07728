"""Figure of docs/deployment.md: latency and bytes of exported files, relative to float.

`make latency` draws it from evidence/logs/latency.log.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

from evidence.pages.drawing import STYLE
from qat.analysis.analysis import GREY, PALETTE, panels

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "evidence" / "logs" / "latency.log"
DOCS = ROOT / "docs"
TITLES = {
    "deit_tiny_patch16_224": "DeiT-T",
    "deit_small_patch16_224": "DeiT-S",
    "swin_tiny_patch4_window7_224": "Swin-T",
}
TIME = "batch 1, "

# Cells by model, file and column.
Tables = dict[str, dict[str, dict[str, str]]]


def read(log: str) -> Tables:
    """Read the tables that `evidence/speed/latency.py` prints."""
    tables: Tables = {}
    rows = []
    for line in log.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    for row, next_row in zip(rows, [*rows[1:], []], strict=True):
        if _is_rule(next_row):
            columns = row[1:]
            files = tables.setdefault(row[0], {})
        elif not _is_rule(row):
            cells = zip(columns, row[1:], strict=True)
            files[row[0]] = {column: cell for column, cell in cells if cell}
    return tables


def _is_rule(row: list[str]) -> bool:
    """True for the line of dashes below a table's head."""
    return set("".join(row)) == {"-"}


def draw(tables: Tables, target: Path) -> None:
    """Draw a panel for each model as SVG.

    Bars are bytes, markers the times of runtimes with one image, both relative to float.
    """
    with mpl.rc_context(mpl.rcParamsDefault | STYLE):
        figure, axes = panels(1, len(tables), height=3.9)
        for axis, (net, files) in zip(axes, tables.items(), strict=True):
            _panel(axis, files)
            time = files["float"][f"{TIME}ms"]
            megabytes = float(files["float"]["MB"])
            title = f"{TITLES.get(net, net)} (float: {time} ms, {megabytes:.0f} MB)"
            axis.set_title(title, fontsize=8)
            axis.set_xlim(0, 1.8)
            if axis is not axes[0]:
                axis.set_yticklabels([])
        axes[len(axes) // 2].set_xlabel(
            "share of the float file's bytes, and of its time in onnxruntime", fontsize=9
        )
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper left", ncols=len(labels), fontsize=8, frameon=False
        )
        figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})


def _panel(axis: mpl.axes.Axes, files: Mapping[str, Mapping[str, str]]) -> None:
    positions = {file: -number for number, file in enumerate(files)}
    base = float(files["float"]["MB"])
    sizes = {}
    for file, row in files.items():
        if "MB" in row:
            sizes[positions[file]] = float(row["MB"]) / base
    axis.barh(list(sizes), list(sizes.values()), height=0.55, color=GREY, alpha=0.35, label="bytes")
    runtimes = [name for name in files["float"] if name.startswith(TIME) and name != f"{TIME}ms"]
    for runtime, color, marker in zip(runtimes, PALETTE, "osD^v", strict=False):
        times = {}
        for file, row in files.items():
            if runtime in row:
                times[positions[file]] = float(row[runtime])
        label = f"time, {runtime.removeprefix(TIME)}"
        axis.plot(list(times.values()), list(times), marker, color=color, markersize=5, label=label)
    axis.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
    labels = [file.replace("int8 of onnxruntime", "onnxruntime int8") for file in positions]
    axis.set_yticks(list(positions.values()), labels)
    axis.grid(visible=False, axis="y")


if __name__ == "__main__":
    draw(read(LOG.read_text(encoding="utf-8")), DOCS / "figures" / "latency.svg")
