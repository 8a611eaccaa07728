"""Time of a quantized training step in float steps of the same net: forward, loss, backward and AdamW.

Run by `make step-time`. Eager: all arms are in one process and take turns, one step a round in an order drawn anew. `--compiled`: a fresh
process for each arm, in which the eager float net, the compiled one and the compiled arm take turns (more compiled nets in a process would
share code objects and reach the limit of recompilations); every net has to be one graph, without breaks. A ratio is the median over the
rounds of arm / float in the same round, in CPU seconds of the process, so that a busy machine slows both alike; the lowest and the highest
stand behind it, then the median of the same by the clock. One thread; random weights; scales from the batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_arms, timing
from benchmarks.step_arms import ARMS, COMPILED_FLOAT, FLOAT, RECOMPUTED
from benchmarks.timing import Timing, ratio


def eager_steps(model: str, batch: step_arms.Batch, bits: int, memories: list[str]) -> dict[str, timing.Step]:
    """A step for each arm and memory mode, the latter in brackets unless it is the default."""
    steps = {}
    for name, arm in ARMS.items():
        teacher = step_arms.teacher_of(model, batch[0], arm)
        for memory in memories:
            if memory == "save" or name in RECOMPUTED:
                net = step_arms.build(model, batch[0], arm, bits, memory)
                steps[name if memory == "save" else f"{name} [{memory}]"] = step_arms.step(net, batch, teacher)
    return steps


def measure_compiled(args: argparse.Namespace) -> None:
    """The work of a fresh process: print the timings of one arm as JSON."""
    batch, steps, compiled = step_arms.random_batch(args.batch), {}, 0
    with step_arms.aggressive_recomputation():
        for key, arm in {FLOAT: ARMS[FLOAT], COMPILED_FLOAT: ARMS[FLOAT], args.one: ARMS[args.one]}.items():
            net = step_arms.build(args.models[0], batch[0], arm, args.bits)
            teacher: Any = step_arms.teacher_of(args.models[0], batch[0], arm)
            if key != FLOAT:
                net.compile(fullgraph=True)
                compiled += 1
            if teacher is not None:
                teacher, compiled = torch.compile(teacher.__call__, fullgraph=True), compiled + 1
            steps[key] = step_arms.step(net, batch, teacher)
        timings = timing.take_turns(steps, args.rounds, args.warmup)
    step_arms.check_graphs(compiled)
    print(json.dumps({name: dataclasses.asdict(one) for name, one in timings.items()}))


def float_line(model: str, args: argparse.Namespace, of: Timing) -> str:
    """Head of a table."""
    cpu, wall = (1000 * statistics.median(seconds) for seconds in (of.cpu, of.wall))
    setting = f"{model}, batch {args.batch}, W{args.bits}A{args.bits}, {args.rounds} rounds"
    return f"{setting}: eager float step {cpu:.0f} ms CPU, {wall:.0f} ms wall\n"


def eager(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in this process, print the table."""
    memories = ["save", *([args.memory] if args.memory else [])]
    timings = timing.take_turns(eager_steps(model, step_arms.random_batch(args.batch), args.bits, memories), args.rounds, args.warmup)
    print(float_line(model, args, timings[FLOAT]))
    rows = [[name, str(ratio(one, timings[FLOAT])), f"{one.first:.1f}"] for name, one in timings.items() if name != FLOAT]
    print(timing.table(["eager arm [memory]", "x float: CPU [range], wall", "first step, s"], rows), flush=True)
    return {name: dataclasses.asdict(one) for name, one in timings.items()}


def compiled(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure each arm in a process of its own, print the table."""
    found: dict[str, Any] = {}
    rows = []
    for name in args.arms:
        options = ("--batch", args.batch, "--bits", args.bits, "--rounds", args.rounds, "--warmup", args.warmup)
        found[name] = timing.in_a_process(__file__, "--compiled", "--one", name, "--models", model, *options)
        if found[name] is None:
            rows.append([name, "failed", "", ""])
            continue
        of = {key: Timing(**seconds) for key, seconds in found[name].items()}
        if not rows:
            print(float_line(model, args, of[FLOAT]))
            rows.append([FLOAT, "1", str(ratio(of[COMPILED_FLOAT], of[FLOAT])), f"{of[COMPILED_FLOAT].first:.0f}"])
        rows.append([name, *(str(ratio(of[name], of[base])) for base in (COMPILED_FLOAT, FLOAT)), f"{of[name].first:.0f}"])
    print(timing.table(["compiled arm", "x compiled float: CPU [range], wall", "x eager float", "ready, s"], rows), flush=True)
    return found


def main() -> None:
    """Print a table for each net."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[step_arms.MODEL])
    parser.add_argument("--arms", nargs="+", default=[name for name in ARMS if name != FLOAT], help="compiled ones to measure")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds in front, not timed")
    parser.add_argument("--memory", choices=["recompute"], help="measure the attentions with qat.set_execution(memory=...) as well")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--one", help="for the processes of --compiled: the arm to measure")
    parser.add_argument("--out", type=Path, help="JSON of all seconds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        measure_compiled(args)
        return
    print(timing.environment())
    found = {}
    for model in args.models:
        print()
        found[model] = (compiled if args.compiled else eager)(model, args)
    settings = {key: getattr(args, key) for key in ("batch", "bits", "rounds", "compiled")}
    timing.write_json(args.out, {"settings": settings, "seconds": found})


if __name__ == "__main__":
    main()
