"""Training steps of several nets beside the float net, eager and compiled: the measurement and the table of `step_time.py` and `peers.py`.

Eager: all nets are in one process and take turns, one step a round in an order drawn anew. Compiled: a fresh process for each net, in which
the eager float net, the compiled one and the compiled net take turns (more compiled nets in a process would share code objects and reach
the limit of recompilations), all under aggressive recomputation. A ratio is the median over the rounds of net / float in the same round,
in CPU seconds of the process, so that a busy machine slows both alike; the lowest and the highest stand behind it, then the median of the
same by the clock. `saved`: bytes that autograd is handed for backward, in those of the eager float step; compiled, these are what the
partitioner chose. One thread; random weights; scales from the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

from evidence import step_arms, timing
from evidence.step_arms import FLOAT, MIB, saved_bytes
from evidence.timing import Timing, ratio

COMPILED_FLOAT = "compiled float"
# From model, images and bits: the net in training mode, and the teacher whose logits the step follows.
Row = Callable[[str, Tensor, int], tuple[nn.Module, Any]]


def arm(name: str) -> Row:
    """The row of one of our own arms."""
    one = step_arms.ARMS[name]
    return lambda model, images, bits: (step_arms.build(model, images, one, bits), step_arms.teacher_of(model, images, one))


def arguments(about: str, rows: Mapping[str, Row], bits: int) -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--models", nargs="+", default=[step_arms.MODEL])
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=bits)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds in front, not timed")
    parser.add_argument("--compiled", action="store_true", help="measure compiled nets too")
    parser.add_argument("--one", help="for the processes of --compiled: the row to measure")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    return parser.parse_args()


def eager(model: str, rows: Mapping[str, Row], args: argparse.Namespace) -> dict[str, Any]:
    """By row: seconds, and bytes kept for backward. Rows whose library is not there say why."""
    batch, nets, steps, found = step_arms.random_batch(args.batch), {}, {}, {}
    for name, row in ({FLOAT: arm(FLOAT)} | dict(rows)).items():
        try:
            nets[name], teacher = row(model, batch[0], args.bits)
            steps[name] = step_arms.step(nets[name], batch, teacher)
        except ImportError as error:
            found[name] = {"skipped": str(error)}
    for name, one in timing.take_turns(steps, args.rounds, args.warmup).items():
        found[name] = {"timing": dataclasses.asdict(one), "saved": saved_bytes(nets[name], steps[name])}
    return found


def measure_compiled(row: Row, args: argparse.Namespace) -> None:
    """The work of a fresh process: print what one row comes to as JSON."""
    batch, nets, steps = step_arms.random_batch(args.batch), {}, {}
    for name, one in {FLOAT: arm(FLOAT), COMPILED_FLOAT: arm(FLOAT), args.one: row}.items():
        nets[name], teacher = one(args.models[0], batch[0], args.bits)
        if name != FLOAT:
            nets[name].compile()
        steps[name] = step_arms.step(nets[name], batch, None if teacher is None else torch.compile(teacher.__call__))
    with functorch_config.patch(aggressive_recomputation=True):
        timings = timing.take_turns(steps, args.rounds, args.warmup)
        saved = saved_bytes(nets[args.one], steps[args.one])
    graphs, breaks = counters["stats"]["unique_graphs"] - 1, sum(counters["graph_break"].values())
    seconds = {name: dataclasses.asdict(one) for name, one in timings.items()}
    print(json.dumps({"timings": seconds, "saved": saved, "graphs": graphs, "breaks": breaks}))


def cells(found: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Time and memory of a row, eager."""
    if "skipped" in found:
        return [f"left out: {found['skipped']}", ""]
    saved = f"{found['saved'] / base['saved']:.2f} ({found['saved'] / MIB:.0f} MiB)"
    return [str(ratio(Timing(**found["timing"]), Timing(**base["timing"]))), saved]


def compiled_cells(found: dict[str, Any] | None, name: str, base: dict[str, Any]) -> list[str]:
    """Time in compiled and in eager float steps, memory, graphs, time until ready."""
    if found is None:
        return ["failed", "", "", "", ""]
    of = {key: Timing(**seconds) for key, seconds in found["timings"].items()}
    shares = [str(ratio(of[name], of[key])) for key in (COMPILED_FLOAT, FLOAT)]
    return [*shares, f"{found['saved'] / base['saved']:.2f}", f"{found['graphs']}, {found['breaks']}", f"{of[name].first:.0f}"]


def run(script: str, about: str, rows: Mapping[str, Row], bits: int, what: str = "") -> None:
    """Print a table for each net; the whole of a benchmark.

    Args:
        script: its file, for the fresh processes.
        about: its description.
        rows: what to measure, by name.
        bits: of weights and activations.
        what: said on top.
    """
    args = arguments(about, rows, bits)
    torch.set_num_threads(1)
    if args.one:
        measure_compiled(rows[args.one], args)
        return
    print(timing.environment(), what, flush=True)
    chosen, all_found = {name: rows[name] for name in args.rows}, {}
    options = ("--batch", args.batch, "--bits", args.bits, "--rounds", args.rounds, "--warmup", args.warmup)
    for model in args.models:
        sys.stdout, stdout = sys.stderr, sys.stdout  # some of the libraries talk
        found = eager(model, chosen, args)
        sys.stdout = stdout
        base, head = found[FLOAT], ["net", "eager x float: CPU [range], wall", "saved x float"]
        lines = {name: [name, *cells(found[name], base)] for name in chosen}
        if args.compiled:
            head += ["compiled x compiled float", "x eager float", "saved x float", "graphs, breaks", "ready, s"]
            for name in [name for name in chosen if "skipped" not in found[name]]:
                found[name]["compiled"] = timing.in_a_process(script, "--one", name, "--models", model, *options)
                lines[name] += compiled_cells(found[name]["compiled"], name, base)
        seconds = " CPU, ".join(f"{1000 * statistics.median(base['timing'][key]):.0f} ms" for key in ("cpu", "wall"))
        print(f"\n{model}, batch {args.batch}, W{args.bits}A{args.bits}, {args.rounds} rounds: eager float step {seconds} wall\n")
        print(timing.table(head, [line + [""] * (len(head) - len(line)) for line in lines.values()]), flush=True)
        all_found[model] = found
    timing.write_json(args.out, {"batch": args.batch, "bits": args.bits, "rounds": args.rounds, "what": what, "found": all_found})
