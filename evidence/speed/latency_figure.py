"""Figure of docs/deployment.md: latency and bytes of exported files, relative to float.

From evidence/logs/latency.log, by `make latency`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

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
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "qat", "font.family": "DejaVu Sans"}

# Cells by model, file and column.
Tables = dict[str, dict[str, dict[str, str]]]


def read(log: str) -> Tables:
    """Read the tables that `evidence/speed/latency.py` prints."""
    tables: Tables = {}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in log.splitlines()
        if line.startswith("|")
    ]
    for row, after in zip(rows, [*rows[1:], []], strict=True):
        if after and set("".join(after)) == {"-"}:
            columns, files = row[1:], tables.setdefault(row[0], {})
        elif set("".join(row)) != {"-"}:
            files[row[0]] = {
                column: cell for column, cell in zip(columns, row[1:], strict=True) if cell
            }
    return tables


def draw(tables: Tables, target: Path) -> None:
    """Draw a panel for each model as SVG: bars for bytes, a mark for each runtime's time with one image, both as a share of float's."""
    with mpl.rc_context(mpl.rcParamsDefault | STYLE):
        figure, axes = panels(1, len(tables), height=3.9)
        for axis, (net, files) in zip(axes, tables.items(), strict=True):
            _panel(axis, files)
            float_file = files["float"]
            axis.set_title(
                f"{TITLES.get(net, net)} (float: {float_file[f'{TIME}ms']} ms, {float(float_file['MB']):.0f} MB)",
                fontsize=8,
            )
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
    places = {file: -number for number, file in enumerate(files)}
    base = float(files["float"]["MB"])
    sizes = {places[file]: float(row["MB"]) / base for file, row in files.items() if "MB" in row}
    axis.barh(list(sizes), list(sizes.values()), height=0.55, color=GREY, alpha=0.35, label="bytes")
    runtimes = [name for name in files["float"] if name.startswith(TIME) and name != f"{TIME}ms"]
    for runtime, color, marker in zip(runtimes, PALETTE, "osD^v", strict=False):
        times = {places[file]: float(row[runtime]) for file, row in files.items() if runtime in row}
        axis.plot(
            list(times.values()),
            list(times),
            marker,
            color=color,
            markersize=5,
            label=f"time, {runtime.removeprefix(TIME)}",
        )
    axis.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
    axis.set_yticks(
        list(places.values()),
        [file.replace("int8 of onnxruntime", "onnxruntime int8") for file in places],
    )
    axis.grid(visible=False, axis="y")


if __name__ == "__main__":
    draw(
        read(LOG.read_text(encoding="utf-8")),
        DOCS / "figures" / "latency.svg",
    )
