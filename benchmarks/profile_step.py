"""Where the time of a training step goes, by kind of operation, for the float net and each arm; and what none of them can do without.

Run by `make profile-step`, eager, one thread, all arms in turns. The CPU time of a step, measured without the profiler, is shared out as
torch's profiler has the self time of operations, which is by the clock and makes small operations slower than they are. An operation
belongs to the quantizers if it runs inside one of them or inside an autograd function of qat, or is the backward of such a one; matrix
products, softmax, GELU and copies count as what they are wherever they run, but inside a C++ kernel, whose time is the function's own. The
second table has the floor of each arm: multiply-accumulates at the rate of a Linear of the net, and the bytes that quantizers must move at
the rate of a copy, both measured here.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import step_arms
from benchmarks.step_arms import ARMS, FLOAT, RECOMPUTED, Step, Timing, ratio
from benchmarks.step_floor import Floor, floor, machine_rates
from qat.model.sites import iter_quantizers

OURS = "qat.quantizer"
LINEARS, PRODUCTS = "GEMM of Linears", "attention matmuls"
# By what the name of an operation begins with, wherever it runs.
KINDS = {
    LINEARS: ("aten::addmm", "aten::mm"),
    PRODUCTS: (
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_dot_product",
        "aten::_flash_attention",
        "aten::_efficient_attention",
    ),
    "softmax": ("aten::_softmax",),
    "GELU": ("aten::gelu",),
    "LayerNorm": ("aten::native_layer_norm",),
    "convolution": ("aten::convolution_backward", "aten::mkldnn_convolution", "aten::thnn_conv", "aten::_slow_conv", "aten::im2col"),
    "copies": ("aten::copy_", "aten::cat"),
}
# Autograd functions whose products of matrices are an attention's.
ATTENTIONS = ("_Attention", "_Qkr")
REDUCTIONS = ("aten::sum", "aten::mean", "aten::abs_mean", "aten::amax", "aten::norm")
QUANTIZERS, SUMS, OPTIMIZER, REST = "quantizers, elementwise", "quantizers, reductions", "optimizer", "rest"
TEACHER = "teacher"
GROUPS = (*KINDS, QUANTIZERS, SUMS, TEACHER, OPTIMIZER, REST)


def _outer(event: Any) -> Iterator[Any]:
    """The event and those around it."""
    while event is not None:
        yield event
        event = event.cpu_parent


class Sorter:
    """Tells which group an event of a profile belongs to.

    Args:
        events: all of them.
    """

    def __init__(self, events: Iterable[Any]) -> None:
        kinds = [cls.__name__ for cls in _subclasses(torch.autograd.Function) if cls.__module__.startswith("qat.")]
        self._ours = {OURS, *kinds, *(f"{kind}Backward" for kind in kinds)}
        self._differentiated = {e.sequence_nr for e in events if e.sequence_nr >= 0 and self._runs_in_ours(e)}

    def _runs_in_ours(self, event: Any) -> bool:
        return any(one.name in self._ours for one in _outer(event))

    def _of_quantizers(self, event: Any) -> bool:
        """Inside a quantizer, or the backward of something that is."""
        backward = (one.sequence_nr for one in _outer(event) if one.name.startswith("autograd::"))
        return self._runs_in_ours(event) or any(number in self._differentiated for number in backward)

    def group(self, event: Any) -> str:
        """One of `GROUPS`."""
        around = [one.name for one in _outer(event)]
        if TEACHER in around:
            return TEACHER
        if any(name.startswith("Optimizer.") for name in around):
            return OPTIMIZER
        if event.name.startswith(KINDS[LINEARS]) and any(name.startswith(ATTENTIONS) for name in around):
            return PRODUCTS
        kind = next((kind for kind, starts in KINDS.items() if event.name.startswith(starts)), None)
        if kind is not None:
            return kind
        if self._of_quantizers(event):
            return SUMS if event.name.startswith(REDUCTIONS) else QUANTIZERS
        return REST


def _subclasses(kind: type) -> Iterator[type]:
    child: type
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, seen under a name in profiles."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return run


Spent = Counter[tuple[str, str]]
_SEEN: set[type] = set()


def profiled(run: Step) -> Spent:
    """Milliseconds of a step, by group and operation."""
    with profile(activities=[ProfilerActivity.CPU]) as result:
        run()
    events = result.events()
    sorter = Sorter(events)
    spent: Spent = Counter()
    for event in events:
        spent[sorter.group(event), event.name] += event.self_cpu_time_total / 1000
    return spent


def in_turns(steps: dict[str, Step], rounds: int, timings: dict[str, Timing]) -> dict[str, Spent]:
    """CPU milliseconds of a step of each arm, shared out by the profiles of some rounds."""
    sums: dict[str, Spent] = {name: Counter() for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            sums[name].update(profiled(run))
    return {name: _scaled(one, 1000 * statistics.median(timings[name].cpu)) for name, one in sums.items()}


def _scaled(spent: Spent, total: float) -> Spent:
    return Counter({key: ms * total / sum(spent.values()) for key, ms in spent.items()})


def by_group(spent: Spent) -> dict[str, float]:
    """Milliseconds of each group."""
    return {group: sum(ms for (one, _), ms in spent.items() if one == group) for group in GROUPS}


def time_table(spent: dict[str, dict[str, float]], timings: dict[str, Timing]) -> str:
    """Groups against arms."""
    rows = [[group, *(f"{spent[name][group]:.0f}" for name in spent)] for group in GROUPS]
    rows.append(["step", *(f"{sum(spent[name].values()):.0f}" for name in spent)])
    rows.append(["x float, in turns", *(f"{ratio(timings[name], timings[FLOAT]).cpu:.2f}" for name in spent)])
    return step_arms.table(["CPU ms", *spent], rows)


def floor_table(floors: dict[str, Floor], teacher: Floor, float_ms: float) -> str:
    """Products and bytes of each arm; the time of what is more than float's, upon a float step."""
    rate, bandwidth = machine_rates()
    base, rows = floors[FLOAT], []
    for name, one in floors.items():
        extra = teacher.macs if ARMS[name].teacher else 0
        products, bytes_moved = (1000 * s for s in one.seconds(rate, bandwidth))
        products += 1000 * extra / rate
        more = products - 1000 * base.macs / rate
        macs = [f"{one.forward / 1e9:.2f}", f"{one.backward / 1e9:.2f}", f"{extra / 1e9:.2f}", f"{(one.macs + extra) / base.macs:.3f}"]
        times = [f"{products:.0f}", f"{one.moved / 2**20:.0f}", f"{bytes_moved:.0f}"]
        ratios = [f"{1 + more / float_ms:.2f}", f"{1 + (more + bytes_moved) / float_ms:.2f}"]
        rows.append([name, *macs, *times, *ratios])
    measured = f"{rate / 1e9:.1f} GMAC/s, {bandwidth / 1e9:.1f} GB/s; a float step is {float_ms:.0f} ms of CPU\n\n"
    head = [
        "arm",
        "GMAC forward",
        "backward",
        "teacher",
        "x float",
        "ms",
        "MiB quantizers move",
        "ms",
        "floor, products",
        "floor, with bytes",
    ]
    return measured + step_arms.table(head, rows)


def prepare(args: argparse.Namespace, name: str) -> tuple[Step, Floor]:
    """Step of an arm in which quantizers and teacher have names, and its floor."""
    arm, batch = ARMS[name], step_arms.random_batch(args.batch)
    net = step_arms.build(args.model, batch[0], arm, args.bits, args.memory if name in RECOMPUTED else "save")
    teacher = step_arms.teacher_of(args.model, batch[0], arm)
    least = floor(net, batch)
    # Of the class: a quantizer whose own `forward` is patched is not fused with the product behind it.
    for kind in {type(site.quantizer) for site in iter_quantizers(net)} - _SEEN:
        kind.forward = _named(kind.forward, OURS)  # type: ignore[method-assign]
        _SEEN.add(kind)
    return step_arms.step(net, batch, None if teacher is None else _named(teacher, TEACHER)), least


def arguments() -> argparse.Namespace:
    """What to profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=12, help="operations to name of each arm")
    parser.add_argument("--memory", choices=step_arms.MEMORIES, default="save")
    parser.add_argument("--out", type=Path, help="JSON of all milliseconds")
    return parser.parse_args()


def main() -> None:
    """Print both tables."""
    args = arguments()
    torch.set_num_threads(1)
    print(f"{step_arms.environment()}\n{args.model}, batch {args.batch}, W{args.bits}A{args.bits}\n", flush=True)
    steps: dict[str, Step] = {}
    floors: dict[str, Floor] = {}
    for name in ARMS:
        steps[name], floors[name] = prepare(args, name)
    timings = step_arms.take_turns(steps, args.steps, warmup=2)
    spent = in_turns(steps, args.steps, timings)
    groups = {name: by_group(one) for name, one in spent.items()}
    print(time_table(groups, timings), "\n")
    batch = step_arms.random_batch(args.batch)
    frozen = floor(step_arms.build(args.model, batch[0], ARMS[FLOAT], args.bits), batch, frozen=True)
    print(floor_table(floors, frozen, 1000 * statistics.median(timings[FLOAT].cpu)))
    for name, one in spent.items():
        print(f"\n{name}: " + "; ".join(f"{group}: {event} {ms:.0f} ms" for (group, event), ms in one.most_common(args.top)))
    step_arms.write_json(args.out, {"model": args.model, "batch": args.batch, "bits": args.bits, "milliseconds": groups})


if __name__ == "__main__":
    main()
