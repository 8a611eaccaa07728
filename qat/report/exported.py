"""What a page says of an exported file: its size and time beside the float file of the same net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qat.report.numbers import MISSING, number, percent, scaled, times

FILES = {"float": "Float", "int8": "Dynamic int8 of onnxruntime", "this": "This file"}
RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO"}


def exported(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Figures (title, value, what it means) and a table of `export.py`'s results; None of another command's."""
    size, agreement = number(results.get("size_bytes")), number(results.get("agreement"))
    if results.get("command") != "export" or size is None:
        return None
    sizes, times_of = _numbers(results.get("bytes")), results.get("latency_ms")
    taken = {runtime: _numbers(times_of.get(runtime)) for runtime in RUNTIMES} if isinstance(times_of, Mapping) else {}
    whole = sizes.get("float")
    figures = [("Size", scaled(size, "B"), f"{times(whole / size)} smaller than in float" if whole else "as stored")]
    baseline = taken.get("onnxruntime", {}).get("float")
    for name, title in RUNTIMES.items():
        own = taken.get(name, {}).get("this")
        if baseline and own:
            figures.append((f"Time, {title}", f"{milliseconds(own)} ms", f"{own / baseline:.2f} of float in onnxruntime"))
    figures.append(("Same class", f"{percent(agreement)} %", "of the images as the checkpoint, or more"))
    rows = [
        {"file": label, "Bytes": sizes[name]}
        | {f"{title}, ms": milliseconds(taken[runtime].get(name)) for runtime, title in RUNTIMES.items() if taken.get(runtime)}
        for name, label in FILES.items()
        if name in sizes
    ]
    return {"file": results.get("file"), "figures": figures, "rows": rows}


def milliseconds(value: float | None) -> str:
    """Two decimals."""
    return MISSING if value is None else f"{value:.2f}"


def _numbers(node: object) -> dict[str, float]:
    """Of each file; what is no number is left out."""
    found = {name: number(node.get(name)) for name in FILES} if isinstance(node, Mapping) else {}
    return {name: one for name, one in found.items() if one}
