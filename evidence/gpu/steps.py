"""Training steps in bfloat16 autocast by model, batch, arm and mode: a process each, which compiles while others do and is timed in turns.

A turn is a few steps; in each round every variant of a group has one, in an order drawn anew, so that a ratio to the float net is one of
neighbours in time.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from evidence.gpu.children import LATE
from evidence.gpu.clock import busy, timed
from evidence.gpu.nets import ARM_NAMES, BF16_TEACHER, Step, build, images_of, teacher_of, training_step
from evidence.gpu.records import Records, Row
from evidence.step_arms import FLOAT
from qat import kernels
from qat.lit.compiled import compile_in_place

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
WARM_UP = 3
# Seconds that a group's first steps may take, and those of a turn; a group is begun only with this much left.
PREPARATION, TURN, NEEDED = 200.0, 60.0, 60.0


@dataclasses.dataclass(frozen=True)
class Variant:
    """A step that is timed.

    Attributes:
        model: timm's name.
        batch: images.
        arm: one of `ARM_NAMES`.
        mode: `compiled`, `blocks` (compiled with one graph that all blocks share, the rest eager), `eager` or `plain` (eager without
            kernels), and `+ graph` where a CUDA graph holds all of it.
    """

    model: str
    batch: int
    arm: str
    mode: str

    @property
    def name(self) -> str:
        """Of its row."""
        return f"step, {self.model}, {self.batch}, {self.arm}, {self.mode}"


class Stepper:
    """The step of a variant, in a process of its own.

    Args:
        variant: which.
        dry_run: a tiny net on the CPU.
    """

    def __init__(self, variant: Variant, *, dry_run: bool) -> None:
        self.variant, self.dry_run = variant, dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.step: Step | None = None

    def prepare(self) -> Row:
        """The first steps; asked for again after it ran out of memory, what is compiled already is there."""
        self._give_back()
        mode = self.variant.mode
        # Not "auto" for what is measured with kernels: a device on which they fail would be timed without them.
        with_kernels = mode.startswith("eager") and self.variant.arm != FLOAT and not self.dry_run
        kernels.use("triton" if with_kernels else "off" if mode == "plain" else "auto")
        began = time.monotonic()
        if self.step is None:
            self.step = self._build()
        loss = self.step().item()
        first = time.monotonic() - began
        if "graph" in mode and not self.dry_run:
            self.step = captured(self.step)
        if not abs(loss) < float("inf"):
            return {"failed": f"the loss of the first step is {loss}"}
        self._give_back()
        return {"first_s": first, "loss": loss}

    def _build(self) -> Step:
        model, arm, is_compiled = self.variant.model, self.variant.arm, self.variant.mode.startswith("compiled")
        images = images_of(self.variant.batch, self.device, tiny=self.dry_run)
        net = build(model, arm, images, tiny=self.dry_run)
        if is_compiled and not self.dry_run:
            compile_in_place(net)
        if self.variant.mode == "blocks" and not self.dry_run:
            for block in net.blocks:
                compile_in_place(block)
        return training_step(net, images, teacher_of(model, arm, images, compiled=is_compiled, tiny=self.dry_run))

    def turn(self, steps: int) -> Row:
        """A few steps, timed; the one in front of them gets its memory from the device anew."""
        assert self.step is not None  # noqa: S101  (narrows a type)
        self.step()
        row = timed(self.step, steps, self.device)
        self._give_back()
        return row

    def idleness(self, steps: int) -> Row:
        """In how much of a step the device does something."""
        assert self.step is not None  # noqa: S101  (narrows a type)
        row = busy(self.step, steps, self.device)
        self._give_back()
        return row

    def _give_back(self) -> None:
        if self.device.type == "cuda":
            gc.collect()  # what an error of the last call holds on to
            torch.cuda.empty_cache()


def captured(step: Step) -> Step:
    """A CUDA graph of a whole step, weights' update included."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def run() -> torch.Tensor:
        graph.replay()
        return loss

    return run


def ran_out(row: Row) -> bool:
    """True if there was too little memory, as torch, cuBLAS and CUDA say it."""
    said = row.get("failed", "").lower()
    return any(words in said for words in ("outofmemory", "out of memory", "alloc_failed", "cublas_status_not_initialized"))


def variants(models: Iterable[str], batch: int, arms: Iterable[str], mode: str) -> list[Variant]:
    """All of them."""
    return [Variant(model, batch, arm, mode) for model in models for arm in arms]


def groups(models: list[str], *, dry_run: bool) -> list[list[Variant]]:
    """What is timed together, the most valuable answers first."""
    if dry_run:
        return [variants(models[:1], 2, ["float", BF16_TEACHER], "compiled"), variants(models[:1], 2, ["float", "ofq"], "eager")]
    own = [arm for arm in ARM_NAMES if " + " not in arm]
    few = ["float", "ofq without qkr", "ofq"]
    small = [model for model in models if "base" not in model]
    large = [model for model in models if "base" in model]
    return [
        group
        for group in (
            variants(small, 256, ARM_NAMES, "compiled") + variants(small[:1], 256, ["float", "ofq"], "blocks"),
            variants(small, 256, [*own, "ofq + teacher"], "eager") + variants(small, 256, ["ofq"], "plain"),
            variants(large, 256, [*own, "ofq + teacher"], "compiled"),
            variants(small, 256, ["float", "ofq"], "compiled + graph") + variants(small[:1], 256, ["float", "ofq"], "eager + graph"),
            variants(small, 64, own, "compiled"),
            variants(small, 64, ["float", "ofq"], "compiled + graph") + variants(small, 64, ["float", "ofq"], "eager"),
            variants(large, 64, few, "compiled"),
            variants(large, 64, few, "eager"),
        )
        if group
    ]


class Group:
    """Variants that take turns. Those whose row is there already run again: a ratio needs its neighbour.

    Args:
        members: the variants.
        records: of all measurements.
        start: makes the process of a variant.
    """

    def __init__(self, members: list[Variant], records: Records, start: Callable[[Variant], Any]) -> None:
        self.records = records
        wanted = [v for v in members if records.wants(v.name, needs=NEEDED)]
        self.members = {v.name: start(v) for v in members} if wanted else {}
        self.rows: dict[str, Row] = {}
        self.label = f"{len(members)} from {members[0].name}"
        for child in self.members.values():
            child.send("prepare")

    def finish(self, rounds: int, steps: int) -> None:
        """Wait until all are ready, time them and write their rows."""
        until = min(time.monotonic() + PREPARATION, self.records.until)
        for name, child in self.members.items():
            self.rows[name] = child.receive(until)
        for name in [name for name, row in self.rows.items() if ran_out(row)]:
            self.rows[name] = self._call(name, PREPARATION, "prepare")  # now that no other is at it
        for turn in range(rounds + 1):
            self._round(turn, steps)
        for name in self._running() if time.monotonic() < self.records.until else ():
            self.rows[name] |= self._call(name, TURN, "idleness", steps)
        for name, row in self.rows.items():
            if row.get("failed") == LATE and time.monotonic() > self.records.until:
                self.records.left.append(name)
            else:
                self.records.add(name, {**row, "group": self.label})
        for child in self.members.values():
            child.close()

    def _call(self, name: str, seconds: float, method: str, *given: Any) -> Row:
        child = self.members[name]
        child.send(method, *given)
        return child.receive(time.monotonic() + seconds)

    def _running(self) -> list[str]:
        return [name for name, row in self.rows.items() if "failed" not in row]

    def _round(self, turn: int, steps: int) -> None:
        """A turn each; the first round is not kept, and without time for the rest the rounds so far are all there are."""
        if turn > 2 and time.monotonic() > self.records.until:
            return
        for name in random.Random(turn).sample(self._running(), len(self._running())):
            found, row = self._call(name, TURN, "turn", steps), self.rows[name]
            if "failed" in found:
                row |= found
            elif turn:
                for key in ("ms", "host_ms", "peak"):
                    row.setdefault(key, []).append(found[key])
