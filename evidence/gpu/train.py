"""Train on CIFAR-10: for each seed, a float model, and quantized models that start from it.

The float model is also the teacher of the quantized models. Several processes train on one device
at the same time. The state of a run is stored after every epoch, so that a killed run resumes
exactly: order and augmentation depend only on seed and epoch, and nothing else is random. The model
with the best validation accuracy is tested once. The next command repeats a failed run, because
other processes may have used up the memory.
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
from evidence.gpu.rows import Row, Worker, append, end_all, read, result_of
from evidence.speed.timing import table
from qat.lit.compiled import compile_in_place
from qat.lit.optim import build_optimizer, cosine_schedule
from qat.lit.teacher import Teacher
from qat.losses import CrossEntropy, Distillation, StepContext
from qat.nn.quant_module import cached_weights
from qat.spec import PRESETS
from qat.utils.files import read_torch, write_torch

# Number of validation images.
VALIDATION = 5000
CLASSES = 10
SIZE = 32
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
BATCH = 512
EVAL_BATCH = 1000
# Number of images for the initial scales.
CALIBRATION = 128
# Float models are trained from random weights, with shifts; quantized models without shifts and at
# half the learning rate, as in docs/accuracy.md.
FLOAT_LR = 1e-3
LR = 5e-4
WEIGHT_DECAY = 0.05
SHIFT = 4
WARM_UP = 0.05
TEMPERATURE = 4.0
# A run starts only if this many seconds are left, because its first epoch includes compilation.
NEEDED = 60.0
# Seconds reserved for processes that end late.
GRACE = 15.0
# Number of runs at the same time.
PROCESSES = 6
SEEDS = 8
FLOAT = "float"
BASE = "w2a2 statsq"
QKR = "w2a2 statsq qkr"
# LSQ with the best initial step sizes.
LSQ = {"weight_quantizer": "lsq", "step_init": "mse"}
SEQ = {**PRESETS["seq"], "offset_init": "zero"}
VARIANTS: dict[str, dict[str, Any]] = {
    FLOAT: {},
    BASE: {},
    "w2a2 lsq": LSQ,
    "w2a2 seq": SEQ,
    QKR: {"attention": "qkr"},
    "w2a8 statsq": {"act_bits": 8},
    "w2a8 lsq": {**LSQ, "act_bits": 8},
    "w2a8 seq": {**SEQ, "act_bits": 8},
}


class Run(NamedTuple):
    """A variant, and the seed of the order, the augmentation and a float model's weights."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant} seed{self.seed}"

    def file(self, out: Path, kind: str) -> Path:
        """File of the run's `state`, or of its `best` model."""
        return out.parent / "runs" / f"{self}.{kind}".replace(" ", "-")


def runs(*, dry_run: bool) -> list[Run]:
    """All runs: all variants of a seed, then the next seed."""
    num_seeds = 1 if dry_run else SEEDS
    return [Run(name, seed) for seed in range(num_seeds) for name in VARIANTS]


def prepare(folder: Path, target: Path, *, dry_run: bool) -> None:
    """Decode the parquet files of both splits into a file of tensors, unless it exists.

    Args:
        folder: folder of the parquet files.
        target: the file of tensors.
        dry_run: write a few random images instead.

    Raises:
        FileNotFoundError: there are no parquet files.
    """
    if target.exists():
        return
    parts = {}
    for split in ("train", "test"):
        parts[split] = _random_images(split) if dry_run else _decoded_images(folder, split)
    write_torch(target, parts)


def _random_images(split: str) -> tuple[Tensor, Tensor]:
    count = 32 if split == "train" else 8
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % CLASSES


def _decoded_images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    import pyarrow.parquet as pq  # not needed once images are decoded

    files = sorted(folder.rglob(f"{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"--train {folder}: must hold {split}*.parquet of CIFAR-10")
    pixels = []
    labels = []
    for file in files:
        columns = pq.read_table(file).to_pydict()
        for cell in columns.get("img", columns.get("image")):
            image = Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
            pixels.append(np.asarray(image))
        labels += columns["label"]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels)


class Cifar:
    """Images and labels of all parts on a device.

    The validation images are the same in every run: the last of the shuffled training images.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
        std = torch.tensor(STD, device=device).view(3, 1, 1)
        splits = {}
        for name, (pixels, labels) in read_torch(file, map_location=device).items():
            splits[name] = (pixels.float() / 255 - mean) / std, labels
        images, labels = splits["train"]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(device)
        num_validation = min(VALIDATION, len(images) // 4)
        train_indices = order[:-num_validation]
        validation_indices = order[-num_validation:]
        self.parts = {
            "train": (images[train_indices], labels[train_indices]),
            "val": (images[validation_indices], labels[validation_indices]),
            "test": splits["test"],
        }
        self.device = device

    def batches(self, name: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of all images of a part, in order."""
        images, labels = self.parts[name]
        return zip(images.split(size), labels.split(size), strict=True)

    def epoch(
        self, seed: int, epoch: int, size: int, shift: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of equal size; remaining images are not used.

        Order, flips and shifts are functions of seed and epoch.
        """
        images, labels = self.parts["train"]
        generator = torch.Generator(self.device).manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(images), generator=generator, device=self.device)
        for indices in order[: len(order) // size * size].split(size):
            yield augmented(images[indices], shift, generator), labels[indices]


def augmented(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Flip half of the images, and move each by up to `shift` pixels; zeros fill the border."""
    device = images.device
    num_images, _, height, width = images.shape
    flip = torch.rand(num_images, generator=generator, device=device) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    size = (2, num_images, 1)
    down, right = torch.randint(2 * shift + 1, size, generator=generator, device=device)
    row = torch.arange(height, device=device) + down
    column = torch.arange(width, device=device) + right
    padded = F.pad(images, [shift] * 4).permute(0, 2, 3, 1)
    index = torch.arange(num_images, device=device).view(-1, 1, 1)
    moved = padded[index, row.unsqueeze(2), column.unsqueeze(1)]
    return moved.permute(0, 3, 1, 2).contiguous()


def nets_of(run: Run, args: argparse.Namespace, data: Cifar) -> tuple[nn.Module, Teacher | None]:
    """The initial model, and its teacher; the teacher is None for a float run.

    All blocks share one graph: whole models take three times as long to compile.
    """
    torch.manual_seed(run.seed)
    net = _float_net(args).to(data.device)
    teacher = _float_net(args).to(data.device)
    if run.variant != FLOAT:
        weights_file = Run(FLOAT, run.seed).file(args.out, "best")
        weights = read_torch(weights_file, map_location=data.device)
        net.load_state_dict(weights)
        teacher.load_state_dict(weights)
        recipe = qat.recipe("ofq", bits=2, **{"attention": "standard", **VARIANTS[run.variant]})
        images, _ = next(data.batches("train", CALIBRATION))
        qat.initialize_scales(qat.convert(net, recipe, input_size=(3, SIZE, SIZE)), [images])
    if not args.dry_run:
        for block in (*net.blocks, *teacher.blocks):
            compile_in_place(block)
    return net, None if run.variant == FLOAT else Teacher(teacher)


def _float_net(args: argparse.Namespace) -> nn.Module:
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3} if args.dry_run else {}
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=SIZE, patch_size=4, num_classes=CLASSES, **sizes
    )


class Schedule(NamedTuple):
    """Settings of a float or a quantized run."""

    epochs: int
    lr: float
    shift: int
    warm_up: float


def _schedule_of(run: Run, args: argparse.Namespace) -> Schedule:
    if run.variant == FLOAT:
        return Schedule(args.float_epochs, FLOAT_LR, SHIFT, WARM_UP)
    return Schedule(args.epochs, LR, 0, 0.0)


def train(run: Run, args: argparse.Namespace, until: float) -> Row:
    """Train a run, or resume it, while there is time for another epoch.

    Args:
        run: the run.
        args: options of the command.
        until: time on the clock of `time.monotonic` by which to stop.

    Returns:
        The row of the finished run, or `stopped` with the number of finished epochs.
    """
    data = Cifar(args.out.parent / "cifar10.pt", torch.device("cpu" if args.dry_run else "cuda"))
    net, teacher = nets_of(run, args, data)
    epochs, lr, shift, warm_up = _schedule_of(run, args)
    optimizer = build_optimizer(net, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    steps = epochs * (len(data.parts["train"][0]) // args.batch)
    schedule = cosine_schedule(
        optimizer, periods=steps, warmup=int(warm_up * steps), interval="step"
    )
    state_file = run.file(args.out, "state")
    name = {"variant": run.variant, "seed": run.seed}
    state: dict[str, Any] = {"epoch": 0, "best_val": -1.0, "best_epoch": -1, "best": {}}
    if state_file.exists():
        state = read_torch(state_file, map_location=data.device)
        net.load_state_dict(state.pop("net"))
        optimizer.load_state_dict(state.pop("optimizer"))
    seconds = 0.0
    for epoch in range(state["epoch"], epochs):
        if time.monotonic() + seconds > until:
            return {"stopped": epoch}
        start_time = time.monotonic()
        batches = enumerate(data.epoch(run.seed, epoch, args.batch, shift), epoch * steps // epochs)
        loss = one_epoch(net, teacher, optimizer, schedule, batches)
        val = accuracy(net, data, "val")
        seconds = time.monotonic() - start_time
        if val > state["best_val"]:
            state["best_val"] = val
            state["best_epoch"] = epoch
            state["best"] = {key: value.clone() for key, value in net.state_dict().items()}
        state["epoch"] = epoch + 1
        tensors = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        write_torch(state_file, {**state, **tensors})
        append(args.out, {**name, "epoch": epoch, "val": val, "loss": loss, "seconds": seconds})
    net.load_state_dict(state["best"])
    write_torch(run.file(args.out, "best"), net.state_dict())
    row = {
        **name,
        "val": state["best_val"],
        "best_epoch": state["best_epoch"],
        "test": accuracy(net, data, "test"),
    }
    append(args.out, row)
    state_file.unlink(missing_ok=True)
    return row


def one_epoch(
    net: nn.Module,
    teacher: Teacher | None,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    batches: Iterable[tuple[int, tuple[Tensor, Tensor]]],
) -> float:
    """Train on numbered batches, and return the mean loss."""
    term = CrossEntropy() if teacher is None else Distillation(temperature=TEMPERATURE)
    losses = []
    net.train()
    for step, (images, target) in batches:
        schedule.step_update(step)
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = net(images)
            teacher_logits = None if teacher is None else teacher(images)
            loss = term(StepContext(logits, target, teacher_logits, net))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(net: nn.Module, data: Cifar, part: str) -> float:
    """Top-1 in percent; the model runs eagerly, which saves compiling a second graph."""
    net.eval()
    eager = torch.compiler.set_stance("force_eager")
    correct = []
    with eager, cached_weights(net), torch.autocast(data.device.type, torch.bfloat16):
        for images, target in data.batches(part, EVAL_BATCH):
            correct.append((net(images).argmax(1) == target).sum())
    return 100 * torch.stack(correct).sum().item() / len(data.parts[part][1])


def train_all(selected: list[Run], args: argparse.Namespace, until: float) -> list[Run]:
    """Train unfinished runs, each after the float run that it starts from.

    Args:
        selected: runs to train.
        args: options of the command.
        until: time on the clock of `time.monotonic` by which to stop.

    Returns:
        The runs that are left.
    """
    finished = {Run(row["variant"], row["seed"]) for row in read(args.out) if "test" in row}
    waiting = [run for run in selected if run not in finished]
    running: dict[concurrent.futures.Future[Row], tuple[Run, Worker]] = {}
    while True:
        for run in waiting:
            has_start = run.variant == FLOAT or Run(FLOAT, run.seed) in finished
            is_running = any(run == other for other, _ in running.values())
            has_time = time.monotonic() + NEEDED < until
            if has_start and not is_running and has_time and len(running) < PROCESSES:
                worker = Worker(in_thread=args.dry_run)
                running[worker.send(train, run, args, until)] = run, worker
        timeout = max(until + GRACE - time.monotonic(), 0)
        ready, _ = concurrent.futures.wait(running, timeout, concurrent.futures.FIRST_COMPLETED)
        for future in ready:
            run, worker = running.pop(future)
            row = result_of(future, until)
            worker.close()
            if "test" in row:
                finished.add(run)
                waiting.remove(run)
            elif "failed" in row:
                waiting.remove(run)
                append(args.out, {"variant": run.variant, "seed": run.seed, **row})
            print(f"{run}: {row.get('failed') or row}", flush=True)
        if not ready:
            end_all()
            return waiting


def command(args: argparse.Namespace) -> str:
    """Train unfinished runs while there is time; return the tables of all rows."""
    until = time.monotonic() + args.seconds - GRACE
    prepare(args.train, args.out.parent / "cifar10.pt", dry_run=args.dry_run)
    args.batch = BATCH
    if args.dry_run:
        args.epochs = 2
        args.float_epochs = 2
        args.batch = 8
    selected = [run for run in runs(dry_run=args.dry_run) if fnmatch.fnmatch(str(run), args.only)]
    left = train_all(selected, args, until)
    text = report(read(args.out))
    if left:
        names = ", ".join(map(str, left))
        text += f"\n\n{len(left)} runs are left, run the command again: {names}"
    return text


def report(rows: list[Row]) -> str:
    """Test top-1 of each variant, and differences of runs with the same seed, in Markdown."""
    top1: dict[str, dict[int, float]] = {name: {} for name in VARIANTS}
    for row in rows:
        if "test" in row and row["variant"] in top1:
            top1[row["variant"]][row["seed"]] = row["test"]
    lines = [_line(name, list(values.values())) for name, values in top1.items() if values]
    for name in VARIANTS:
        base = f"{name.split()[0]} statsq"
        if base not in VARIANTS or name == base:
            continue
        seeds = top1[name].keys() & top1[base].keys()
        differences = [top1[name][seed] - top1[base][seed] for seed in seeds]
        if differences:
            lines.append(_line(f"{name} - {base}", differences, "+"))
    return table(["variant", "seeds", "test top-1 ± std"], lines)


def _line(name: str, values: list[float], sign: str = "") -> list[str]:
    """Name, number of seeds, mean ± standard deviation."""
    mean = f"{statistics.fmean(values):{sign}.2f}"
    if len(values) > 1:
        mean += f" ± {statistics.stdev(values):.2f}"
    return [name, str(len(values)), mean]
