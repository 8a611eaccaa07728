"""A quantized training step on a CUDA device in bfloat16 autocast: time and memory in those of the float step, eager and compiled.

Run by `make gpu-step`. A process a model compiles and then waits for its turn, so that models compile side by side and are timed alone.
In a process all variants take turns in an order drawn anew each round, a few steps a turn, timed by CUDA events; a ratio is the median
over the rounds of variant / float run likewise, its lowest and highest behind it. Memory is the highest allocation of a step above weights
and the optimizer's state. Random weights and images; scales from the first images. `--matmuls` asks instead whether products of codes
would pay.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch._dynamo.config as dynamo_config
from torch import Tensor, nn

import qat
from benchmarks import gpu_matmuls
from benchmarks.step_arms import ARMS, FLOAT, Arm, aggressive_recomputation, table
from qat import kernels
from qat.lit.teacher import Teacher
from qat.losses import CompositeLoss, CrossEntropy, Distillation, StepContext

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
TINY = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3}
COMPILED = "compiled"
CALIBRATION = 8
READY = "ready\n"


@dataclasses.dataclass
class Variant:
    """Milliseconds of a step in each round, and the most bytes above what is there between steps; or why there are none."""

    milliseconds: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0
    failed: str = ""


class Bench:
    """Steps of one model, by (arm, mode).

    Args:
        model: timm's name.
        args: of the command line.
    """

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args, self.device = args, torch.device("cpu" if args.dry_run else "cuda")
        size = TINY["img_size"] if args.dry_run else 224
        images = torch.randn(args.batch, 3, size, size)
        self.nets = {name: self.build(model, arm, images[:CALIBRATION]) for name, arm in ARMS.items() if not arm.teacher}
        self.batch = images.to(self.device), torch.arange(args.batch, device=self.device) % 1000
        self.steps: dict[tuple[str, str], Callable[[], None]] = {}
        self.found: dict[tuple[str, str], Variant] = {}

    def build(self, model: str, arm: Arm, images: Tensor) -> nn.Module:
        """A net with random weights, converted unless it is the float net, on the CPU."""
        net = timm.create_model(model, num_classes=1000, **(TINY if self.args.dry_run else {}))
        if arm.knobs is not None:
            recipe = qat.recipe("ofq", bits=self.args.bits, **arm.knobs)
            qat.initialize_scales(qat.convert(net, recipe, input_size=images.shape[1:]), [images])
        return net.train()

    def net_of(self, name: str, mode: str) -> nn.Module:
        """A copy of an arm's net on the device; a teacher's student is the net of the arm without one."""
        net = copy.deepcopy(self.nets[name.partition(" + ")[0]]).to(self.device)
        if mode == COMPILED:
            net.compile(fullgraph=True, backend="eager" if self.args.dry_run else "inductor")
        return net

    def step(self, name: str, mode: str) -> Callable[[], None]:
        """Forward, loss, backward and AdamW."""
        net, (images, target) = self.net_of(name, mode), self.batch
        teacher = Teacher(self.net_of(FLOAT, mode)) if ARMS[name].teacher else None
        loss = CompositeLoss({"ce": CrossEntropy()} if teacher is None else {"kd": Distillation()})
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16):
                total, _ = loss(StepContext(net(images), target, None if teacher is None else teacher(images), net))
            total.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def first(self, name: str, mode: str) -> None:
        """The step that sets everything up: a variant that fails is left out, with its reason."""
        variant = self.found[name, mode] = Variant()
        try:
            kernels.use(mode if mode in kernels.CHOICES else "auto")
            step = self.step(name, mode)
            step()
            self.steps[name, mode] = step
        except (RuntimeError, qat.UsageError) as error:  # out of memory, no compiler, no Triton
            variant.failed = f"{type(error).__name__}: {error}".partition("\n")[0][:120]

    def turn(self, name: str, mode: str) -> None:
        """A few steps, timed."""
        kernels.use(mode if mode in kernels.CHOICES else "auto")
        milliseconds, peak = timed(self.steps[name, mode], self.args.steps, self.device)
        variant = self.found[name, mode]
        variant.milliseconds.append(milliseconds)
        variant.peak = max(variant.peak, peak)

    def compile(self) -> None:
        """The first compiled steps; what there is no time for is left out."""
        late = time.monotonic() + 60 * self.args.compile_minutes
        for name in sorted(ARMS, key=lambda name: name != FLOAT):
            if time.monotonic() < late:
                self.first(name, COMPILED)
            else:
                self.found[name, COMPILED] = Variant(failed="not compiled in time")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self) -> dict[tuple[str, str], Variant]:
        """Time everything; the first round is not kept."""
        for name in ARMS:
            for mode in ["off"] if name == FLOAT else self.args.eager:
                self.first(name, mode)
        for turn in range(self.args.rounds + 1):
            for key in random.Random(turn).sample(sorted(self.steps), len(self.steps)):
                self.turn(*key)
        for variant in self.found.values():
            del variant.milliseconds[:1]
        return self.found


def timed(run: Callable[[], None], steps: int, device: torch.device) -> tuple[float, int]:
    """Milliseconds of a step, and the most bytes above what was there before; 0 on a CPU, which does not count them."""
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(steps):
            run()
        return 1000 * (time.perf_counter() - began) / steps, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps, torch.cuda.max_memory_allocated() - before


def share(variant: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Cell of a ratio of times."""
    if base is None or not variant["milliseconds"] or not base["milliseconds"]:
        return ""
    ratios = [a / b for a, b in zip(variant["milliseconds"], base["milliseconds"], strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def rows_of(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each arm and mode."""
    rows = []
    for name in ARMS:
        for mode, variant in sorted((key.partition("|")[2], one) for key, one in found.items() if key.partition("|")[0] == name):
            base = found.get(f"{FLOAT}|{COMPILED if mode == COMPILED else 'off'}")
            eager = found.get(f"{FLOAT}|off")
            if variant["failed"]:
                rows.append([name, mode, variant["failed"], "", "", "", ""])
                continue
            memory = f"{variant['peak'] / base['peak']:.2f}" if base and base["peak"] else ""
            milliseconds = f"{statistics.median(variant['milliseconds']):.1f}"
            rows.append([name, mode, milliseconds, share(variant, base), share(variant, eager), f"{variant['peak'] / 2**30:.2f}", memory])
    return rows


def child(args: argparse.Namespace) -> None:
    """The work of a process: say when everything is compiled, wait for a line, print what was found as JSON."""
    dynamo_config.recompile_limit = 64  # nets of all arms share the code of timm's forward
    dynamo_config.automatic_dynamic_shapes = False
    bench = Bench(args.one, args)
    with aggressive_recomputation() if args.aggressive_recomputation else nullcontext():
        bench.compile()
    print(READY, end="", flush=True)
    sys.stdin.readline()
    found = bench.measure()
    print(json.dumps({"|".join(key): dataclasses.asdict(variant) for key, variant in found.items()}))


def in_turns(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Start a process for each model; let one at a time go on, once all have compiled."""
    command = [sys.executable, "-m", "benchmarks.gpu_step", *sys.argv[1:], "--one"]
    jobs = {model: subprocess.Popen([*command, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for model in args.models}
    for job in jobs.values():
        assert job.stdout is not None  # noqa: S101  (narrows a type)
        next((line for line in iter(job.stdout.readline, "") if line == READY), None)
    found = {}
    for model, job in jobs.items():
        out, _ = job.communicate("go\n")
        found[model] = json.loads(out.splitlines()[-1]) if job.returncode == 0 else {}
    return found


def environment(args: argparse.Namespace) -> str:
    """Device, versions and setting."""
    device = "CPU, sizes for a try alone" if args.dry_run else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, timm {timm.__version__}, CUDA {torch.version.cuda}"
    return (
        f"{device}, {versions}; batch {args.batch}, W{args.bits}A{args.bits}, bfloat16 autocast, {args.rounds} rounds of {args.steps} steps"
    )


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--eager", nargs="+", default=["triton", "off"], help="values of `kernels` to measure without the compiler")
    parser.add_argument("--compile-minutes", type=float, default=4, help="start to compile no further arm after this")
    parser.add_argument("--aggressive-recomputation", action="store_true", help="compile nets that keep less for backward")
    parser.add_argument("--matmuls", action="store_true", help="measure the Linears of the last model in bfloat16, int8 and float8")
    parser.add_argument("--dry-run", action="store_true", help="a try on the CPU with a tiny net, without the compiler")
    parser.add_argument("--one", help="for the processes: the model to measure")
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    args = parser.parse_args()
    args.models = args.models or MODELS[: 1 if args.dry_run else None]
    if args.dry_run:
        args.batch, args.rounds, args.steps, args.eager = 2, 1, 1, ["auto", "off"]
    return args


def main() -> None:
    """Print a table for each model."""
    args = arguments()
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu_step: there is no CUDA device; --dry-run tries the code on a CPU")
    if args.one:
        child(args)
        return
    print(environment(args))
    content: dict[str, Any] = {"environment": environment(args)}
    if args.matmuls:
        content["matmuls"] = gpu_matmuls.measure(args.models[-1], args.batch, dry_run=args.dry_run)
        print(gpu_matmuls.report(args.models[-1], content["matmuls"]))
    else:
        content["steps"] = in_turns(args)
        head = ["arm", "mode", "ms", "x float, same mode", "x float, eager", "GiB above weights", "x float, same mode"]
        for model, found in content["steps"].items():
            print(f"\n{model}\n\n{table(head, rows_of(found)) if found else 'failed'}", flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
