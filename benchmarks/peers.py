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

from benchmarks import step_arms, timing
from benchmarks.memory import MIB, saved_bytes
from benchmarks.peer_nets import PEERS
from benchmarks.step_arms import ARMS, COMPILED_FLOAT, FLOAT
from benchmarks.timing import Timing, ratio

BITS = 4
LIBRARIES = ("torchao", "brevitas", "nvidia-modelopt")
OURS = {
    "qat, linears": ("W4 StatsQ per channel, A4 per token, learned, offsets; first and last layer W8 A8", "linears"),
    "qat, OFQ without QKR": ("also queries, keys, values and probabilities A4", "ofq without qkr"),
    "qat, OFQ": ("also query-key reparameterization", "ofq"),
}


def build(model: str, images: Tensor, row: str) -> nn.Module:
    """The net of a row of the table, in training mode."""
    if row in OURS or row in {FLOAT, COMPILED_FLOAT}:
        return step_arms.build(model, images, ARMS[OURS[row][1] if row in OURS else FLOAT], BITS)
    return PEERS[row][1](build(model, images, FLOAT), images).train()


def versions() -> str:
    """Of what is installed."""
    there = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return ", ".join(f"{library} {there.get(library, 'not installed')}" for library in LIBRARIES)


def eager(args: argparse.Namespace) -> dict[str, Any]:
    """By row: seconds, and bytes kept for backward. Rows whose library is not there say why."""
    batch, nets, found = step_arms.random_batch(args.batch), {}, {}
    for row in (FLOAT, *args.rows):
        try:
            nets[row] = build(args.model, batch[0], row)
        except ImportError as error:
            found[row] = {"skipped": str(error)}
    steps = {row: step_arms.step(net, batch) for row, net in nets.items()}
    timings = timing.take_turns(steps, args.rounds, args.warmup)
    return found | {row: {"timing": dataclasses.asdict(timings[row]), "saved": saved_bytes(net, steps[row])} for row, net in nets.items()}


def measure_compiled(args: argparse.Namespace) -> None:
    """The work of a fresh process: print what one row comes to as JSON."""
    batch, row = step_arms.random_batch(args.batch), args.one
    nets = {key: build(args.model, batch[0], key) for key in (FLOAT, COMPILED_FLOAT, row)}
    nets[COMPILED_FLOAT].compile(fullgraph=True)
    nets[row].compile(fullgraph=row in OURS)
    with step_arms.aggressive_recomputation():
        steps = {key: step_arms.step(net, batch) for key, net in nets.items()}
        timings = timing.take_turns(steps, args.rounds, args.warmup)
        saved = saved_bytes(nets[row], steps[row])
    graphs, breaks = step_arms.graphs()
    seconds = {key: dataclasses.asdict(one) for key, one in timings.items()}
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
        return ["not measured", "", "", "", ""]
    of = {key: Timing(**seconds) for key, seconds in found["timings"].items()}
    shares = [str(ratio(of[row], of[key])) for key in (COMPILED_FLOAT, FLOAT)]
    return [*shares, f"{found['saved'] / base['saved']:.2f}", f"{found['graphs']}, {found['breaks']}", f"{of[row].first:.0f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=step_arms.MODEL)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds in front, not timed")
    parser.add_argument("--rows", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--one", help="for the fresh processes: the row to measure compiled")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        measure_compiled(args)
        return
    print(f"{timing.environment()}; {versions()}\n{args.model}, batch {args.batch}, {args.rounds} rounds\n", flush=True)
    sys.stdout, stdout = sys.stderr, sys.stdout  # some of the libraries talk
    found = eager(args)
    sys.stdout = stdout
    options = ("--model", args.model, "--batch", args.batch, "--rounds", args.rounds, "--warmup", args.warmup)
    there = [] if args.eager_only else [row for row in args.rows if "skipped" not in found[row]]
    compiled = {row: timing.in_a_process(__file__, "--one", row, *options) for row in there}
    head = ["net", "what of the Linears", "eager x float: CPU [range], wall", "saved x float"]
    head += ["compiled x compiled float", "x eager float", "saved x float", "graphs, breaks", "ready, s"]
    what = {row: about[0] for row, about in {**OURS, **PEERS}.items()}
    base = found[FLOAT]
    cells = {row: [*eager_cells(found[row], base), *compiled_cells(compiled.get(row), row, base)] for row in args.rows}
    print(timing.table(head, [[row, what[row], *cells[row]] for row in args.rows]))
    timing.write_json(args.out, {"eager": found, "compiled": compiled, "versions": versions()})


if __name__ == "__main__":
    main()
