"""Quantizers trained on CIFAR-10: a float net from random weights for each seed, quantized ones from it, with it as their teacher.

Several processes train side by side on one device. After every epoch the state of a run is kept, so that one which was killed goes on as if
it had not been: order and augmentation are functions of seed and epoch, nothing else is random. The net of the epoch that is best on
validation is tested, once. A run that failed is tried again by the next command: those beside it may have taken its memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import io
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from evidence.gpu.rows import Row, Worker, answer, append, end_all, read
from evidence.speed.timing import table
from qat.lit.compiled import compile_in_place
from qat.lit.optim import build_optimizer, cosine_schedule
from qat.lit.teacher import Teacher
from qat.losses import CrossEntropy, Distillation, StepContext
from qat.nn.quant_module import kept_weights
from qat.spec import PRESETS
from qat.utils.files import read_torch, write_torch

VALIDATION, CLASSES, SIZE = 5000, 10, 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
EVAL_BATCH, CALIBRATION = 1000, 128
# Float nets train from random weights with shifts; quantized ones at half the rate without, as those of docs/accuracy.md do.
FLOAT_LR, LR, WEIGHT_DECAY, SHIFT, WARM_UP, TEMPERATURE = 1e-3, 5e-4, 0.05, 4, 0.05, 4.0
# Seconds that have to be left to begin a run, as its first epoch compiles; and for processes that end late.
NEEDED, GRACE = 60.0, 15.0
PROCESSES = 6  # side by side
FLOAT, BASE, QKR, BATCH = "float", "w2a2 statsq", "w2a2 statsq qkr", 512
# LSQ as its own best start has it, and the recipe seq.
LSQ, SEQ = {"weight_quantizer": "lsq", "step_init": "mse"}, PRESETS["seq"]
VARIANTS: dict[str, dict[str, Any]] = {
    FLOAT: {},
    BASE: {},
    "w2a2 lsq": LSQ,
    "w2a2 seq": SEQ,
    QKR: {"attention": "qkr"},
}
VARIANTS |= {
    f"w2a8 {name}": {**knobs, "act_bits": 8}
    for name, knobs in (("statsq", {}), ("lsq", LSQ), ("seq", SEQ))
}
SEEDS = 8


class Run(NamedTuple):
    """A variant and its seed, that of order and augmentation; of a float net also that of its weights."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant} seed{self.seed}"

    def file(self, out: Path, kind: str) -> Path:
        """Where its `state` is kept, or its `best` net."""
        return out.parent / "runs" / f"{self}.{kind}".replace(" ", "-")


def runs(*, dry_run: bool) -> list[Run]:
    """All of them, in order: all variants of a seed before the next seed."""
    return [Run(name, seed) for seed in range(1 if dry_run else SEEDS) for name in VARIANTS]


def prepare(folder: Path, kept: Path, *, dry_run: bool) -> None:
    """Decode the parquet files of both splits, once, into a file of tensors; of a dry run a few random images.

    Raises:
        FileNotFoundError: there are none.
    """
    if kept.exists():
        return
    parts = {}
    for split in ("train", "test"):
        if dry_run:
            count = 32 if split == "train" else 8
            images = torch.randint(
                256,
                (count, 3, SIZE, SIZE),
                dtype=torch.uint8,
                generator=torch.Generator().manual_seed(count),
            )
            parts[split] = images, torch.arange(count) % CLASSES
            continue
        import pyarrow.parquet as pq  # not needed once images are decoded

        files = sorted(folder.rglob(f"{split}*.parquet"))
        if not files:
            raise FileNotFoundError(f"--train {folder}: must hold {split}*.parquet of CIFAR-10")
        columns = [pq.read_table(file).to_pydict() for file in files]
        encoded = [cell["bytes"] for one in columns for cell in one.get("img", one.get("image"))]
        pixels = np.stack([
            np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in encoded
        ])
        labels = torch.tensor([label for one in columns for label in one["label"]])
        parts[split] = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels
    write_torch(kept, parts)


class Cifar:
    """Images of all parts on a device. Those for validation are the same for every run: the last of the training images, shuffled."""

    def __init__(self, kept: Path, device: torch.device) -> None:
        mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))
        parts = {
            name: ((images.float() / 255 - mean) / std, labels)
            for name, (images, labels) in read_torch(kept, map_location=device).items()
        }
        images, labels = parts["train"]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(device)
        held_out = min(VALIDATION, len(images) // 4)
        self.parts = {
            name: (images[at], labels[at])
            for name, at in (("train", order[:-held_out]), ("val", order[-held_out:]))
        }
        self.parts["test"] = parts["test"]
        self.device = device

    def batches(self, name: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of a part in their order."""
        return zip(*(x.split(size) for x in self.parts[name]), strict=True)

    def epoch(
        self, seed: int, epoch: int, size: int, shift: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of one size, what is left over is not used; order, flips and shifts are functions of seed and epoch."""
        images, labels = self.parts["train"]
        generator = torch.Generator(self.device).manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(images), generator=generator, device=self.device)
        for at in order[: len(order) // size * size].split(size):
            yield augmented(images[at], shift, generator), labels[at]


def augmented(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Half of the images flipped, each moved by up to `shift` pixels in both directions, with zeros from outside."""
    n, device = len(images), images.device
    flip = torch.rand(n, generator=generator, device=device) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    down, right = torch.randint(2 * shift + 1, (2, n, 1), generator=generator, device=device)
    row, column = (
        torch.arange(images.shape[i], device=device) + move for i, move in ((2, down), (3, right))
    )
    padded = F.pad(images, [shift] * 4).permute(0, 2, 3, 1)
    which = torch.arange(n, device=device).view(-1, 1, 1)
    return padded[which, row.unsqueeze(2), column.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


def nets_of(run: Run, args: argparse.Namespace, data: Cifar) -> tuple[nn.Module, Teacher | None]:
    """The net at its start, and the float net that it follows. All blocks share one graph: whole nets compile for three times as long."""
    torch.manual_seed(run.seed)
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3} if args.dry_run else {}
    made = [
        timm.create_model(
            "deit_tiny_patch16_224", img_size=SIZE, patch_size=4, num_classes=CLASSES, **sizes
        )
        for _ in range(2)
    ]
    net, teacher = (one.to(data.device) for one in made)
    if run.variant != FLOAT:
        trained = read_torch(Run(FLOAT, run.seed).file(args.out, "best"), map_location=data.device)
        net.load_state_dict(trained)
        teacher.load_state_dict(trained)
        recipe = qat.recipe("ofq", bits=2, **{"attention": "standard", **VARIANTS[run.variant]})
        images, _ = next(data.batches("train", CALIBRATION))
        qat.initialize_scales(qat.convert(net, recipe, input_size=(3, SIZE, SIZE)), [images])
    for block in () if args.dry_run else (*net.blocks, *teacher.blocks):
        compile_in_place(block)
    return net, None if run.variant == FLOAT else Teacher(teacher)


def train(run: Run, args: argparse.Namespace, until: float) -> Row:
    """Train a run, or go on with it, up to the end or while there is time for one epoch more; `until` by `time.monotonic`."""
    data = Cifar(args.out.parent / "cifar10.pt", torch.device("cpu" if args.dry_run else "cuda"))
    net, teacher = nets_of(run, args, data)
    epochs, lr, shift, warm_up = (
        (args.float_epochs, FLOAT_LR, SHIFT, WARM_UP)
        if teacher is None
        else (args.epochs, LR, 0, 0.0)
    )
    optimizer = build_optimizer(net, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    steps = epochs * (len(data.parts["train"][0]) // args.batch)
    schedule = cosine_schedule(
        optimizer, periods=steps, warmup=int(warm_up * steps), interval="step"
    )
    kept, said = run.file(args.out, "state"), {"variant": run.variant, "seed": run.seed}
    state: dict[str, Any] = {"epoch": 0, "best_val": -1.0, "best_epoch": -1, "best": {}}
    if kept.exists():
        state = read_torch(kept, map_location=data.device)
        net.load_state_dict(state.pop("net"))
        optimizer.load_state_dict(state.pop("optimizer"))
    seconds = 0.0
    for epoch in range(state["epoch"], epochs):
        if time.monotonic() + seconds > until:
            return {"stopped": epoch}
        began = time.monotonic()
        batches = enumerate(data.epoch(run.seed, epoch, args.batch, shift), epoch * steps // epochs)
        loss = one_epoch(net, teacher, optimizer, schedule, batches)
        val = accuracy(net, data, "val")
        seconds = time.monotonic() - began
        if val > state["best_val"]:
            state |= {
                "best_val": val,
                "best_epoch": epoch,
                "best": {key: value.clone() for key, value in net.state_dict().items()},
            }
        state["epoch"] = epoch + 1
        write_torch(kept, {**state, "net": net.state_dict(), "optimizer": optimizer.state_dict()})
        append(args.out, {**said, "epoch": epoch, "val": val, "loss": loss, "seconds": seconds})
    net.load_state_dict(state["best"])
    write_torch(run.file(args.out, "best"), net.state_dict())
    row = {
        **said,
        "val": state["best_val"],
        "best_epoch": state["best_epoch"],
        "test": accuracy(net, data, "test"),
    }
    append(args.out, row)
    kept.unlink(missing_ok=True)
    return row


def one_epoch(
    net: nn.Module,
    teacher: Teacher | None,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    batches: Iterable[tuple[int, tuple[Tensor, Tensor]]],
) -> float:
    """Train on the batches, each with the number of its step; gives the mean loss."""
    term, losses = CrossEntropy() if teacher is None else Distillation(temperature=TEMPERATURE), []
    net.train()
    for step, (images, target) in batches:
        schedule.step_update(step)
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = term(
                StepContext(net(images), target, None if teacher is None else teacher(images), net)
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(net: nn.Module, data: Cifar, part: str) -> float:
    """Top-1 in percent; runs eagerly, for the sake of one graph less."""
    net.eval()
    eager = torch.compiler.set_stance("force_eager")
    with eager, kept_weights(net), torch.autocast(data.device.type, torch.bfloat16):
        right = [
            (net(images).argmax(1) == target).sum()
            for images, target in data.batches(part, EVAL_BATCH)
        ]
    return 100 * torch.stack(right).sum().item() / len(data.parts[part][1])


def train_all(wanted: list[Run], args: argparse.Namespace, until: float) -> list[Run]:
    """Train what is not there, each after what it needs; gives what is not done."""
    done = {Run(row["variant"], row["seed"]) for row in read(args.out) if "test" in row}
    waiting = [run for run in wanted if run not in done]
    going: dict[concurrent.futures.Future[Row], tuple[Run, Worker]] = {}
    while True:
        for run in waiting:
            can_start = (run.variant == FLOAT or Run(FLOAT, run.seed) in done) and all(
                run != one for one, _ in going.values()
            )
            if can_start and len(going) < PROCESSES and time.monotonic() + NEEDED < until:
                worker = Worker(here=args.dry_run)
                going[worker.send(train, run, args, until)] = run, worker
        ready, _ = concurrent.futures.wait(
            going, max(until + GRACE - time.monotonic(), 0), concurrent.futures.FIRST_COMPLETED
        )
        for future in ready:
            run, worker = going.pop(future)
            row = answer(future, until)
            worker.close()
            if "test" in row:
                done.add(run)
                waiting.remove(run)
            elif "failed" in row:
                waiting.remove(run)
                append(args.out, {"variant": run.variant, "seed": run.seed, **row})
            print(f"{run}: {row.get('failed') or row}", flush=True)
        if not ready:
            end_all()
            return waiting


def command(args: argparse.Namespace) -> str:
    """Train what is not there yet and time is left for; gives the tables of all that is there."""
    until = time.monotonic() + args.seconds - GRACE
    prepare(args.train, args.out.parent / "cifar10.pt", dry_run=args.dry_run)
    args.batch = BATCH
    if args.dry_run:
        args.epochs = args.float_epochs = 2
        args.batch = 8
    left = train_all(
        [run for run in runs(dry_run=args.dry_run) if fnmatch.fnmatch(str(run), args.only)],
        args,
        until,
    )
    more = (
        f"\n\n{len(left)} runs are left, run the command again: {', '.join(map(str, left))}"
        if left
        else ""
    )
    return report(read(args.out)) + more


def report(rows: list[Row]) -> str:
    """Markdown of all rows: test top-1 of each variant, differences between runs of one seed; mean and standard deviation."""

    def line(name: str, values: list[float], sign: str = "") -> list[str]:
        around = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return [name, str(len(values)), f"{statistics.fmean(values):{sign}.2f}{around}"]

    of = {
        name: {row["seed"]: row["test"] for row in rows if "test" in row and row["variant"] == name}
        for name in VARIANTS
    }
    lines = [line(name, list(found.values())) for name, found in of.items() if found]
    for name in VARIANTS:
        base = f"{name.split()[0]} statsq"
        if base in VARIANTS and name != base and (both := of[name].keys() & of[base]):
            lines.append(
                line(f"{name} - {base}", [of[name][seed] - of[base][seed] for seed in both], "+")
            )
    return table(["variant", "seeds", "test top-1 ± std"], lines)
