"""Time and memory of a quantized training step in those of the float step of the same net: `make step-time`.

Eager: all nets are in one process and take turns, one step a round in an order drawn anew. Compiled: a fresh process for each net,
with empty caches, in which the eager float net, the compiled one and the compiled net take turns, under aggressive recomputation. A
ratio is the median over the rounds of net / float in the same round, in CPU seconds of the process, so that a busy machine slows both
alike; lowest and highest follow, then the median by the clock. `saved`: bytes that autograd is handed for backward, in those of the eager
float step. One thread; random weights. `[recompute]` rows keep less for backward, `qat.set_execution(memory=...)`.
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

COMPILED_FLOAT = "compiled float"
# Attention alone keeps something that could be computed again.
ROWS = ARMS | {
    f"{name} [recompute]": dataclasses.replace(ARMS[name], memory="recompute")
    for name in ("ofq without qkr", "ofq")
}
ROWS |= {
    "linears without offsets": Arm({"attention": "float", "offsets": False}),
    "lsq": Arm({}, recipe="lsq"),
}
ROWS |= {"seq": Arm({}, recipe="seq"), "deploy": Arm({}, recipe="deploy_w4a4")}
HEAD = ["net", "eager x float: CPU [range], wall", "saved x float"]
HEAD_COMPILED = ["compiled x compiled float", "x eager float", "saved x float", "graphs, breaks"]


def eager(model: str, images: Tensor, rounds: int) -> tuple[str, dict[str, list[str]], int]:
    """The float step in words, the cells of every row, and what the float step keeps for backward."""
    nets = {name: build(model, arm, images) for name, arm in ROWS.items()}
    steps = {
        name: training_step(nets[name], images, teacher_of(model, arm, images))
        for name, arm in ROWS.items()
    }
    timings = take_turns(steps, rounds)
    saved = {name: saved_bytes(nets[name], step) for name, step in steps.items()}
    cells = {
        name: [
            name,
            ratio(timings[name], timings[FLOAT]),
            f"{saved[name] / saved[FLOAT]:.2f} ({saved[name] / MIB:.0f} MiB)",
        ]
        for name in ROWS
    }
    cpu, wall = (
        1000 * statistics.median(seconds) for seconds in (timings[FLOAT].cpu, timings[FLOAT].wall)
    )
    return f"eager float step {cpu:.0f} ms CPU, {wall:.0f} ms wall", cells, saved[FLOAT]


def compiled(model: str, row: str, images: Tensor, rounds: int) -> dict[str, Any]:
    """Of one row, in a process of its own: more compiled nets would share code objects and reach the limit of recompilations."""
    nets, steps = {}, {}
    for name, arm in {FLOAT: ROWS[FLOAT], COMPILED_FLOAT: ROWS[FLOAT], row: ROWS[row]}.items():
        nets[name], teacher = build(model, arm, images), teacher_of(model, arm, images)
        if name != FLOAT:
            nets[name].compile()
        steps[name] = training_step(
            nets[name], images, None if teacher is None else torch.compile(teacher.__call__)
        )
    with functorch_config.patch(aggressive_recomputation=True):
        timings = take_turns(steps, rounds)
        saved = saved_bytes(nets[row], steps[row])
    graphs = f"{counters['stats']['unique_graphs'] - 1}, {sum(counters['graph_break'].values())}"
    ratios = [ratio(timings[row], timings[base]) for base in (COMPILED_FLOAT, FLOAT)]
    return {"ratios": ratios, "saved": saved, "graphs": graphs}


def in_a_process(row: str, options: list[str], saved_float: int) -> list[str]:
    """The cells of `compiled`."""
    with tempfile.TemporaryDirectory() as cache:
        command, variables = (
            [sys.executable, __file__, *options, "--one", row],
            {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        )
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, env=variables
        )
    if done.returncode:
        return ["failed", "", "", ""]
    found = json.loads(done.stdout.splitlines()[-1])
    return [*found["ratios"], f"{found['saved'] / saved_float:.2f}", found["graphs"]]


def main() -> None:
    """Print a table for each net."""
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
        said, cells, saved = eager(model, images, args.rounds)
        options = ["--models", model, "--batch", str(args.batch), "--rounds", str(args.rounds)]
        for name in [name for name in cells if name != FLOAT] if args.compiled else ():
            cells[name] += in_a_process(name, options, saved)
        head = HEAD + HEAD_COMPILED * args.compiled
        print(f"\n{model}, batch {args.batch}, W2A2, {args.rounds} rounds: {said}\n")
        print(
            table(head, [row + [""] * (len(head) - len(row)) for row in cells.values()]), flush=True
        )


if __name__ == "__main__":
    main()
