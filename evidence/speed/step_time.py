"""Time and memory of a quantized training step, relative to the float step: `make step-time`.

Eager: all models are in one process and take turns, one step per round in random order. Compiled:
each model has a new process with empty caches, in which the eager float model, the compiled float
model and the compiled quantized model take turns, with aggressive recomputation. A ratio is the
median over the rounds of model / float in the same round, in CPU seconds, so that a busy machine
slows both equally; the lowest and the highest ratio follow, then the median in wall time. `saved`:
bytes that autograd saves for backward, relative to the eager float step. One thread; random
weights. `[recompute]` rows save less for backward, see `qat.set_execution(memory=...)`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

from evidence.speed.steps import (
    ARMS,
    FLOAT,
    MIB,
    Arm,
    build,
    saved_bytes,
    teacher_of,
    training_step,
)
from evidence.speed.timing import environment, ratio, table, take_turns
from qat.lit.compiled import register_decompositions

COMPILED_FLOAT = "compiled float"
# Only attention saves tensors that can be recomputed.
ROWS = ARMS | {
    "ofq without qkr [recompute]": dataclasses.replace(ARMS["ofq without qkr"], memory="recompute"),
    "ofq [recompute]": dataclasses.replace(ARMS["ofq"], memory="recompute"),
    "linears without offsets": Arm({"attention": "float", "offsets": False}),
    "lsq": Arm({}, recipe="lsq"),
    "seq": Arm({}, recipe="seq"),
    "deploy": Arm({}, recipe="deploy_w4a4"),
}
HEAD = ["net", "eager x float: CPU [range], wall", "saved x float"]
HEAD_COMPILED = ["compiled x compiled float", "x eager float", "saved x float", "graphs, breaks"]


def eager(model: str, images: Tensor, rounds: int) -> tuple[str, dict[str, list[str]], int]:
    """Time the eager steps alternately.

    Returns:
        A sentence about the float step; the cells of each row; the bytes that the float step saves
        for backward.
    """
    nets = {name: build(model, arm, images) for name, arm in ROWS.items()}
    steps = {}
    for name, arm in ROWS.items():
        steps[name] = training_step(nets[name], images, teacher_of(model, arm, images))
    timings = take_turns(steps, rounds)
    saved = {name: saved_bytes(nets[name], step) for name, step in steps.items()}
    cells = {}
    for name in ROWS:
        memory = f"{saved[name] / saved[FLOAT]:.2f} ({saved[name] / MIB:.0f} MiB)"
        cells[name] = [name, ratio(timings[name], timings[FLOAT]), memory]
    cpu = 1000 * statistics.median(timings[FLOAT].cpu)
    wall = 1000 * statistics.median(timings[FLOAT].wall)
    return f"eager float step {cpu:.0f} ms CPU, {wall:.0f} ms wall", cells, saved[FLOAT]


def compiled(model: str, row: str, images: Tensor, rounds: int) -> dict[str, Any]:
    """Measure one compiled row. Call this in a separate process for each row.

    Several compiled rows would share code objects and reach the limit of recompilations.
    """
    register_decompositions()
    nets = {}
    steps = {}
    for name, arm in {FLOAT: ROWS[FLOAT], COMPILED_FLOAT: ROWS[FLOAT], row: ROWS[row]}.items():
        nets[name] = build(model, arm, images)
        teacher = teacher_of(model, arm, images)
        if name != FLOAT:
            nets[name].compile()
        teacher_call = None if teacher is None else torch.compile(teacher.__call__)
        steps[name] = training_step(nets[name], images, teacher_call)
    with functorch_config.patch(aggressive_recomputation=True):
        timings = take_turns(steps, rounds)
        saved = saved_bytes(nets[row], steps[row])
    num_graphs = counters["stats"]["unique_graphs"] - 1  # without that of the float model
    graphs = f"{num_graphs}, {sum(counters['graph_break'].values())}"
    ratios = [ratio(timings[row], timings[base]) for base in (COMPILED_FLOAT, FLOAT)]
    return {"ratios": ratios, "saved": saved, "graphs": graphs}


def in_a_process(row: str, options: list[str], saved_float: int) -> list[str]:
    """Measure a compiled row in a new process, and return its cells."""
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.run(
            [sys.executable, __file__, *options, "--one", row],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        )
    if process.returncode:
        return ["failed", "", "", ""]
    measured = json.loads(process.stdout.splitlines()[-1])
    saved = f"{measured['saved'] / saved_float:.2f}"
    return [*measured["ratios"], saved, measured["graphs"]]


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="measure compiled nets too")
    parser.add_argument("--one", choices=ROWS, help="for the processes of --compiled")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, 224, 224)
    if args.one:
        print(json.dumps(compiled(args.models[0], args.one, images, args.rounds)))
        return
    print(environment(), flush=True)
    for model in args.models:
        float_step, cells, saved = eager(model, images, args.rounds)
        head = HEAD
        if args.compiled:
            head = HEAD + HEAD_COMPILED
            options = ["--models", model, "--batch", str(args.batch), "--rounds", str(args.rounds)]
            for name in cells:
                if name != FLOAT:
                    cells[name] += in_a_process(name, options, saved)
        lines = [row + [""] * (len(head) - len(row)) for row in cells.values()]
        print(f"\n{model}, batch {args.batch}, W2A2, {args.rounds} rounds: {float_step}\n")
        print(table(head, lines), flush=True)


if __name__ == "__main__":
    main()
