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

from benchmarks import step_arms
from benchmarks.step_arms import ARMS, FLOAT, RECOMPUTED, Ratio, Timing, ratio

# Goals for DeiT-T at batch 8, in steps of the float net run likewise.
GOALS = {
    "save": {"linears": 1.10, "ofq without qkr": 1.17, "ofq": 1.38, "ofq + teacher": 1.70},
    "recompute": {"ofq without qkr": 1.22, "ofq": 1.45},
    "compiled": {"linears": 1.05, "ofq without qkr": 1.08, "ofq": 1.30, "ofq + teacher": 1.60},
}
GOALS_ARE_FOR = ("deit_tiny_patch16_224", 8)
COMPILED_FLOAT = "compiled float"


def eager_steps(model: str, batch: step_arms.Batch, bits: int, memories: list[str]) -> dict[str, step_arms.Step]:
    """A step for each arm and memory mode, the latter in brackets unless it is the default."""
    steps = {}
    for name, arm in ARMS.items():
        teacher = step_arms.teacher_of(model, batch[0], arm)
        for memory in memories:
            if memory == "save" or name in RECOMPUTED:
                net = step_arms.build(model, batch[0], arm, bits, memory)
                steps[name if memory == "save" else f"{name} [{memory}]"] = step_arms.step(net, batch, teacher)
    return steps


def compiled_steps(model: str, batch: step_arms.Batch, bits: int, name: str) -> tuple[dict[str, step_arms.Step], int]:
    """Steps of the eager float net, of the compiled one and of a compiled arm with its teacher; and how many nets are compiled."""
    arm, steps, n_compiled = ARMS[name], {}, 1
    for key, one in ((FLOAT, ARMS[FLOAT]), (COMPILED_FLOAT, ARMS[FLOAT]), (name, arm)):
        net = step_arms.build(model, batch[0], one, bits)
        teacher: Any = step_arms.teacher_of(model, batch[0], one)
        if key != FLOAT:
            net.compile(fullgraph=True)
        if teacher is not None:
            teacher, n_compiled = torch.compile(teacher.__call__, fullgraph=True), n_compiled + 1
        steps[key] = step_arms.step(net, batch, teacher)
    return steps, n_compiled + 1


def measure_compiled(args: argparse.Namespace) -> None:
    """The work of a fresh process: print the timings of one arm as JSON."""
    batch = step_arms.random_batch(args.batch)
    with step_arms.aggressive_recomputation():
        steps, n_compiled = compiled_steps(args.models[0], batch, args.bits, args.one)
        timings = step_arms.take_turns(steps, args.rounds, args.warmup)
    step_arms.check_graphs(n_compiled)
    print(json.dumps({name: dataclasses.asdict(timing) for name, timing in timings.items()}))


def goal(args: argparse.Namespace, model: str, mode: str, name: str) -> str:
    """Cell of the goal, empty where there is none."""
    known = GOALS[mode].get(name) if (model, args.batch) == GOALS_ARE_FOR else None
    return "" if known is None else f"{known:.2f}"


def float_line(model: str, args: argparse.Namespace, timing: Timing) -> str:
    """Head of a table."""
    cpu, wall = (1000 * statistics.median(seconds) for seconds in (timing.cpu, timing.wall))
    setting = f"{model}, batch {args.batch}, W{args.bits}A{args.bits}, {args.rounds} rounds"
    return f"{setting}: eager float step {cpu:.0f} ms CPU, {wall:.0f} ms wall\n"


def eager(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in this process, print the table."""
    timings = step_arms.take_turns(eager_steps(model, step_arms.random_batch(args.batch), args.bits, args.memory), args.rounds, args.warmup)
    print(float_line(model, args, timings[FLOAT]))
    rows = []
    for name in (name for name in timings if name != FLOAT):
        arm, _, memory = name.removesuffix("]").partition(" [")
        share = ratio(timings[name], timings[FLOAT])
        rows.append([arm, memory or "save", str(share), goal(args, model, memory or "save", arm), f"{timings[name].first:.1f}"])
    print(step_arms.table(["eager arm", "memory", "x float: CPU [range], wall", "goal", "first step, s"], rows), flush=True)
    return {name: dataclasses.asdict(timing) for name, timing in timings.items()}


def compiled(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure each arm in a process of its own, print the table."""
    found: dict[str, Any] = {}
    rows, floats = [], []
    for name in args.arms:
        options = ("--batch", args.batch, "--bits", args.bits, "--rounds", args.rounds, "--warmup", args.warmup)
        result = step_arms.in_a_process(__file__, "--compiled", "--one", name, "--models", model, *options)
        if result is None:
            rows.append([name, "failed", "", "", "", ""])
            continue
        found[name] = result
        timing = {key: Timing(**value) for key, value in result.items()}
        of_compiled, of_eager = (ratio(timing[name], timing[base]) for base in (COMPILED_FLOAT, FLOAT))
        floats.append((timing[FLOAT], timing[COMPILED_FLOAT]))
        rows.append([name, str(of_compiled), goal(args, model, "compiled", name), str(of_eager), "1", f"{timing[name].first:.0f}"])
    if floats:
        print(float_line(model, args, floats[0][0]))
        share: Ratio = ratio(floats[0][1], floats[0][0])
        rows.insert(0, [FLOAT, "1", "", str(share), "1", f"{floats[0][1].first:.0f}"])
    head = ["compiled arm", "x compiled float: CPU [range], wall", "goal", "x eager float", "graphs a net", "ready, s"]
    print(step_arms.table(head, rows), flush=True)
    return found


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[GOALS_ARE_FOR[0]])
    parser.add_argument("--arms", nargs="+", default=[name for name in ARMS if name != FLOAT], help="compiled ones to measure")
    parser.add_argument("--batch", type=int, default=GOALS_ARE_FOR[1])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds in front, not timed")
    parser.add_argument("--memory", choices=["recompute"], help="measure the attentions with qat.set_execution(memory=...) as well")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--one", help="for the processes of --compiled: the arm to measure")
    parser.add_argument("--out", type=Path, help="JSON of all seconds")
    return parser.parse_args()


def main() -> None:
    """Print a table for each net."""
    args = arguments()
    torch.set_num_threads(1)
    if args.one:
        measure_compiled(args)
        return
    print(step_arms.environment())
    recomputes = args.memory == "recompute" and step_arms.has_memory_modes()
    if args.memory == "recompute" and not recomputes:
        print("memory=recompute left out: there is no qat.set_execution")
    args.memory = list(step_arms.MEMORIES) if recomputes else ["save"]
    found = {}
    for model in args.models:
        print()
        found[model] = (compiled if args.compiled else eager)(model, args)
    settings = {key: getattr(args, key) for key in ("batch", "bits", "rounds", "compiled")}
    step_arms.write_json(args.out, {"settings": settings, "seconds": found})


if __name__ == "__main__":
    main()
