"""Memory of a quantized training step in that of the float net: bytes kept for backward, and the peak of the process.

Run by `make memory`. Each arm is in a fresh process. `saved`: bytes of the tensors that autograd is handed for backward, each storage once,
parameters and views of them left out; a teacher keeps none. Compiled, these are what the partitioner chose under aggressive recomputation.
`peak`: highest resident memory during a step above that in front of it, where gradients are freed and the optimizer's state is there; it
also sees what is kept past autograd and what lives for a moment. The C library hands freed tensors back at once (MALLOC_MMAP_THRESHOLD_),
or the holes between tensors would count as well. Both in those of the eager float step. One thread; random weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import step_arms
from benchmarks.step_arms import ARMS, FLOAT, RECOMPUTED, Step

MODES = ("eager", "recompute", "compiled")
# Goals for DeiT-T at batch 8, for `saved`.
GOALS = {
    "eager": {"linears": 0.78, "ofq without qkr": 1.00, "ofq": 1.08, "ofq + teacher": 1.10},
    "recompute": {"ofq without qkr": 0.80, "ofq": 0.90},
    "compiled": {"linears": 0.60, "ofq without qkr": 0.85, "ofq": 0.92, "ofq + teacher": 0.95},
}
GOALS_ARE_FOR = ("deit_tiny_patch16_224", 8)
MIB = 2**20


def saved_bytes(net: nn.Module, run: Step) -> int:
    """Bytes of all storages that are handed to autograd in a step, parameters' aside."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def resident(key: str) -> int:
    """Bytes, by name of the line in Linux's account of the process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_bytes(run: Step) -> int:
    """Highest resident memory during a step above that in front of it; Linux alone tells."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def measure(args: argparse.Namespace) -> None:
    """The work of a fresh process: print the figures of one arm as JSON."""
    arm, batch, compiled = ARMS[args.one], step_arms.random_batch(args.batch), args.modes == ["compiled"]
    net = step_arms.build(args.model, batch[0], arm, args.bits, "recompute" if args.modes == ["recompute"] else "save")
    teacher: Any = step_arms.teacher_of(args.model, batch[0], arm)
    if compiled:
        net.compile(fullgraph=True)
        teacher = None if teacher is None else torch.compile(teacher.__call__, fullgraph=True)
    run = step_arms.step(net, batch, teacher)
    with step_arms.aggressive_recomputation():
        run()
        run()
        found = {"saved": saved_bytes(net, run), "peak": sorted(peak_bytes(run) for _ in range(3))[1]}
    if compiled:
        step_arms.check_graphs(2 if arm.teacher else 1)
    print(json.dumps(found))


def cells(found: dict[str, Any] | None, base: dict[str, Any], goal: float | None) -> list[str]:
    """Of one arm in one mode."""
    if found is None:
        return ["failed", "", ""]
    saved, peak = (f"{found[key] / base[key]:.2f} ({found[key] / MIB:.0f} MiB)" for key in ("saved", "peak"))
    return [saved, "" if goal is None else f"{goal:.2f}", peak]


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=GOALS_ARE_FOR[0])
    parser.add_argument("--batch", type=int, default=GOALS_ARE_FOR[1])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--one", help="for the fresh processes: the arm to measure")
    parser.add_argument("--out", type=Path, help="JSON of all bytes")
    return parser.parse_args()


def pairs(modes: list[str], arms: list[str]) -> list[tuple[str, str]]:
    """Modes and arms to measure, the eager float net first."""
    wanted = [(mode, arm) for mode in modes for arm in arms if mode != "recompute" or arm in RECOMPUTED]
    return [("eager", FLOAT), *(pair for pair in wanted if pair != ("eager", FLOAT))]


def main() -> None:
    """Print the table."""
    args = arguments()
    torch.set_num_threads(1)
    if args.one:
        measure(args)
        return
    print(step_arms.environment())
    print(f"{args.model}, batch {args.batch}, W{args.bits}A{args.bits}; in those of the eager float step\n", flush=True)
    if "recompute" in args.modes and not step_arms.has_memory_modes():
        print("recompute left out: there is no qat.set_execution\n")
        args.modes.remove("recompute")
    found: dict[str, Any] = {}
    rows = []
    cache = tempfile.TemporaryDirectory()  # of the compiler, for all: a teacher does not change what is compiled for the student
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "TORCHINDUCTOR_CACHE_DIR": cache.name}
    for mode, name in pairs(args.modes, args.arms):
        options = ("--one", name, "--modes", mode, "--model", args.model, "--batch", args.batch, "--bits", args.bits)
        result = found[f"{name}, {mode}"] = step_arms.in_a_process(__file__, *options, **variables)
        goal = GOALS[mode].get(name) if (args.model, args.batch) == GOALS_ARE_FOR else None
        rows.append([name, mode, *cells(result, found[f"{FLOAT}, eager"], goal)])
    print(step_arms.table(["arm", "mode", "saved x float", "goal", "peak x float"], rows))
    step_arms.write_json(args.out, {"model": args.model, "batch": args.batch, "bits": args.bits, "bytes": found})


if __name__ == "__main__":
    main()
