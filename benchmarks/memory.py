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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import step_arms, timing
from benchmarks.step_arms import ARMS, FLOAT, RECOMPUTED
from benchmarks.timing import Step

MODES = ("eager", "recompute", "compiled")
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
    arm, batch, (mode,) = ARMS[args.one], step_arms.random_batch(args.batch), args.modes
    net = step_arms.build(args.model, batch[0], arm, args.bits, "recompute" if mode == "recompute" else "save")
    teacher: Any = step_arms.teacher_of(args.model, batch[0], arm)
    if mode == "compiled":
        net.compile(fullgraph=True)
        teacher = None if teacher is None else torch.compile(teacher.__call__, fullgraph=True)
    run = step_arms.step(net, batch, teacher)
    with step_arms.aggressive_recomputation():
        run()
        run()
        found = {"saved": saved_bytes(net, run), "peak": sorted(peak_bytes(run) for _ in range(3))[1]}
    if mode == "compiled":
        step_arms.check_graphs(2 if arm.teacher else 1)
    print(json.dumps(found))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=step_arms.MODEL)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--one", help="for the fresh processes: the arm to measure")
    parser.add_argument("--out", type=Path, help="JSON of all bytes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        measure(args)
        return
    print(timing.environment())
    print(f"{args.model}, batch {args.batch}, W{args.bits}A{args.bits}; in those of the eager float step\n", flush=True)
    wanted = [(mode, arm) for mode in args.modes for arm in args.arms if mode != "recompute" or arm in RECOMPUTED]
    found: dict[str, Any] = {}
    rows = []
    for mode, name in dict.fromkeys([("eager", FLOAT), *wanted]):
        options = ("--one", name, "--modes", mode, "--model", args.model, "--batch", args.batch, "--bits", args.bits)
        one = found[f"{name}, {mode}"] = timing.in_a_process(__file__, *options, MALLOC_MMAP_THRESHOLD_="65536")
        base = found[f"{FLOAT}, eager"]
        cells = [f"{one[key] / base[key]:.2f} ({one[key] / MIB:.0f} MiB)" for key in ("saved", "peak")] if one else ["failed", ""]
        rows.append([name, mode, *cells])
    print(timing.table(["arm", "mode", "saved x float", "peak x float"], rows))
    timing.write_json(args.out, {"model": args.model, "batch": args.batch, "bits": args.bits, "bytes": found})


if __name__ == "__main__":
    main()
