"""Training steps of other quantization libraries beside qat's, on the same timm net, batch and machine: time and bytes kept for backward.

Run by `make peers`, which installs them beside .venv; one that cannot be imported is left out with a note. Eager: all in one process,
taking turns with the float net, as in `make step-time`. Compiled: a fresh process for each, in which the eager float net, the compiled one
and the compiled net of the row take turns; all under aggressive recomputation. W4 A4 in all `nn.Linear`; none of the others quantizes what
an attention does between them, the rows of `ofq` do. One thread; random weights; ranges from the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import step_arms
from benchmarks.memory import MIB, saved_bytes
from benchmarks.peer_nets import PEERS
from benchmarks.step_arms import ARMS, FLOAT, Timing, ratio

BITS = 4
COMPILED_FLOAT = "compiled float"
LIBRARIES = ("torchao", "brevitas", "nvidia-modelopt")
OURS = {
    "qat, linears": ("W4 StatsQ per channel, A4 per token, learned, offsets; first and last layer W8 A8", "linears"),
    "qat, OFQ without QKR": ("likewise; queries, keys, values and probabilities A4", "ofq without qkr"),
    "qat, OFQ": ("likewise; query-key reparameterization", "ofq"),
}


def _float(model: str, images: Tensor) -> nn.Module:
    return step_arms.build(model, images, ARMS[FLOAT], BITS)


def build(model: str, images: Tensor, row: str) -> nn.Module:
    """The net of a row of the table, in training mode."""
    if row in OURS:
        return step_arms.build(model, images, ARMS[OURS[row][1]], BITS)
    return PEERS[row][1](_float(model, images), images).train()


def versions() -> str:
    """Of what is installed."""
    found = []
    for library in LIBRARIES:
        try:
            found.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            found.append(f"{library} not installed")
    return ", ".join(found)


def eager(args: argparse.Namespace) -> dict[str, Any]:
    """By row: seconds, and bytes kept for backward. Rows whose library is not there say why."""
    batch = step_arms.random_batch(args.batch)
    nets, found = {FLOAT: _float(args.model, batch[0])}, {}
    for row in args.rows:
        try:
            nets[row] = build(args.model, batch[0], row)
        except ImportError as error:
            found[row] = {"skipped": str(error)}
    steps = {row: step_arms.step(net, batch) for row, net in nets.items()}
    timings = step_arms.take_turns(steps, args.rounds, args.warmup)
    measured = {row: {"timing": dataclasses.asdict(timings[row]), "saved": saved_bytes(net, steps[row])} for row, net in nets.items()}
    return {**found, **measured}


def measure_compiled(args: argparse.Namespace) -> None:
    """The work of a fresh process: print what one row comes to as JSON."""
    batch, row = step_arms.random_batch(args.batch), args.one
    nets = {FLOAT: _float(args.model, batch[0]), COMPILED_FLOAT: _float(args.model, batch[0]), row: build(args.model, batch[0], row)}
    nets[COMPILED_FLOAT].compile(fullgraph=True)
    nets[row].compile(fullgraph=row in OURS)
    with step_arms.aggressive_recomputation():
        steps = {key: step_arms.step(net, batch) for key, net in nets.items()}
        timings = step_arms.take_turns(steps, args.rounds, args.warmup)
        saved = saved_bytes(nets[row], steps[row])
    graphs, breaks = step_arms.graphs()
    seconds = {key: dataclasses.asdict(timing) for key, timing in timings.items()}
    print(json.dumps({"timings": seconds, "saved": saved, "graphs": graphs - 1, "breaks": breaks}))


def eager_cells(found: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Time and memory of a row."""
    if "skipped" in found:
        return [f"left out: {found['skipped']}", ""]
    saved = f"{found['saved'] / base['saved']:.2f} ({found['saved'] / MIB:.0f} MiB)"
    return [str(ratio(Timing(**found["timing"]), Timing(**base["timing"]))), saved]


def compiled_cells(found: dict[str, Any] | None, row: str, base: dict[str, Any]) -> list[str]:
    """Time in compiled and in eager float steps, memory, graphs, time until ready."""
    if found is None:
        return ["failed", "", "", "", ""]
    timing = {key: Timing(**seconds) for key, seconds in found["timings"].items()}
    of_compiled, of_eager = (str(ratio(timing[row], timing[key])) for key in (COMPILED_FLOAT, FLOAT))
    saved = f"{found['saved'] / base['saved']:.2f}"
    return [of_compiled, of_eager, saved, f"{found['graphs']}, {found['breaks']}", f"{timing[row].first:.0f}"]


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds in front, not timed")
    parser.add_argument("--rows", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--one", help="for the fresh processes: the row to measure compiled")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    return parser.parse_args()


def compile_each(args: argparse.Namespace, rows: list[str]) -> dict[str, Any]:
    """By row, what a process of its own found."""
    options = ("--model", args.model, "--batch", args.batch, "--rounds", args.rounds, "--warmup", args.warmup)
    return {row: step_arms.in_a_process(__file__, "--one", row, *options) for row in rows}


def show(args: argparse.Namespace, found: dict[str, Any], compiled: dict[str, Any]) -> None:
    """Print the table."""
    what = {row: about[0] for row, about in {**OURS, **PEERS}.items()}
    head = ["net", "what of the Linears", "eager x float: CPU [range], wall", "saved x float"]
    rows = [[row, what[row], *eager_cells(found[row], found[FLOAT])] for row in args.rows]
    if not args.eager_only:
        head += ["compiled x compiled float", "x eager float", "saved x float", "graphs, breaks", "ready, s"]
        for cells in rows:
            row = cells[0]
            cells += compiled_cells(compiled[row], row, found[FLOAT]) if row in compiled else [""] * 5
    print(step_arms.table(head, rows))


def main() -> None:
    """Print the table."""
    args = arguments()
    torch.set_num_threads(1)
    if args.one:
        measure_compiled(args)
        return
    print(f"{step_arms.environment()}; {versions()}\n{args.model}, batch {args.batch}, {args.rounds} rounds\n", flush=True)
    sys.stdout, stdout = sys.stderr, sys.stdout  # some of the libraries talk
    found = eager(args)
    sys.stdout = stdout
    there = [row for row in args.rows if "skipped" not in found[row]]
    compiled = {} if args.eager_only else compile_each(args, there)
    show(args, found, compiled)
    step_arms.write_json(args.out, {"eager": found, "compiled": compiled, "versions": versions()})


if __name__ == "__main__":
    main()
