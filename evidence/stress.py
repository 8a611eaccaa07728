"""Kill commands with SIGKILL at moments drawn with a seed, run them again, and compare everything with runs that were not killed.

Run by `make stress`; log `docs/logs/stress.log`. Augmentation, repeated augmentation, mixup, cutmix, dropout, drop path and averaged
weights are on in training. Compared are all tensors and numbers of `last.ckpt`, `best.ckpt`, `quantized.ckpt` and `search.ckpt`, the rows
of the tables, `results.json`, and which files there are; what is measured of the present process (times, throughput) is left out. Each run
is a fork of this process, which has imported everything. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import re
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evidence.stress_moments import become

NET = ("model.args.embed_dim=24", "model.args.depth=1", "++model.args.num_heads=3")
# 19 steps an epoch, by accumulation 10; `last.ckpt` is written 17 times.
TRAIN = (
    *("train.py", *NET, "+model.args.drop_path_rate=0.2", "+model.args.proj_drop_rate=0.2", "report=false"),
    *("data.batch_size=64", "data.augment=timm", "data.repeats=2", "data.mixup=0.8", "data.cutmix=1.0"),
    *("trainer.max_epochs=3", "trainer.log_every_n_steps=2", "checkpoint.every_n_steps=4", "callbacks.ema.decay=0.9", "resume=auto"),
)
CGA = ("callbacks.cga.start_epoch=1", "callbacks.cga.boundary_range=0.1", "callbacks.cga.qk=product")
FREEZE = ("callbacks.freeze.momentum=0.1", "callbacks.freeze.threshold=0.3", "callbacks.freeze.final_threshold=0.2")
PTQ = ("ptq.py", "ckpt={float}", "data.calibration_images=40", "ptq.batch=20", "report=false", "resume=auto")
COMMANDS: dict[str, tuple[str, ...]] = {
    "float": (*TRAIN, "callbacks=[default,ema]", "quant=fp", "trainer.max_epochs=1", "model.args.depth=2"),
    "averaged": (*TRAIN, "callbacks=[default,ema]"),
    "annealed": (*TRAIN, "callbacks=[default,cga,ema]", *CGA),
    "frozen": (*TRAIN, "callbacks=[default,freeze,oscillation,ema]", *FREEZE),
    "accumulated": (
        *(*TRAIN, "callbacks=[default,oscillation,ema]", "checkpoint.every_n_steps=3"),
        *("trainer.accumulate_grad_batches=2", "+trainer.val_check_interval=6"),
    ),
    "sweep": ("train.py", "-m", *TRAIN[1:], "callbacks=[default,ema]", "trainer.max_epochs=1", "quant=ofq_2bit,lsq_4bit", "seed=0,1"),
    "evolq": (*PTQ, "search=evolution", "search.passes=2", "search.cycles=3", "search.radius=0.05"),
}
FILES_OF_TORCH = ("last.ckpt", "best.ckpt", "quantized.ckpt", "search.ckpt")
TABLES = ("metrics.csv", "search.csv", "front.csv", "oscillation.csv")
MEASURED = re.compile(r"(train|validate|test)/(time|batches|samples|device)|throughput/|seconds")
TIMES = ("wall_seconds", "time_elapsed", "finished", "seconds", "versions", "git_commit", "num_workers")
RESUMED = re.compile(r"resumed at step (\d+)|resumed after (\d+)")

Draw = Callable[[random.Random], str]


def among(*moments: str, most: int = 1, least: int = 1) -> Draw:
    """One of some moments, at a number drawn between two."""
    return lambda draw: f"{draw.choice(moments)}:{draw.randint(least, most)}"


WRITING = ("half:last.ckpt", "linked", "complete:last.prev.ckpt", "replaced:last.prev.ckpt", "complete:last.ckpt", "replaced:last.ckpt")
SEARCHING = ("half:search.ckpt", "replaced:search.ckpt", "torn:search.csv")
# Command, and the moments of the kills of one run, one after the other; the last of them may come too late.
KINDS: dict[str, tuple[str, Sequence[Draw]]] = {
    "step": ("averaged", [among("forward", "update", least=2, most=50), among("forward", "update", most=10)]),
    "last.ckpt": ("averaged", [among(*WRITING, least=2, most=12), among(*WRITING, most=3)]),
    "best.ckpt": ("averaged", [among("half:best.ckpt", "complete:best.ckpt", "replaced:best.ckpt")]),
    "metrics.csv": ("averaged", [among("torn:metrics.csv", "complete:metrics.csv", least=2, most=8)]),
    "validation": ("averaged", [among("validation", most=9)]),
    "epoch end": ("averaged", [among("epoch_end", most=3)]),
    "cga": ("annealed", [among("forward", "update", least=19, most=54), among(*WRITING, most=3)]),
    "freeze": ("frozen", [among("forward", "update", *WRITING, least=2, most=12), among("forward", most=12)]),
    "end of freeze": ("frozen", [among("replaced:last.ckpt", least=17, most=17)]),
    "accumulation": ("accumulated", [among("forward", "validation", least=2, most=16), among("forward", most=6)]),
    "sweep": ("sweep", [among("forward", least=20, most=35), among("replaced:last.ckpt", least=5, most=9)]),
    "evolq": ("evolq", [among("candidate", least=3, most=12), among(*SEARCHING, most=2)]),
}


@dataclass
class Killed:
    """What became of a run: moments of the kills, their steps, steps at which it went on, what differs, how much was compared."""

    moments: list[str] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    values: int = 0
    rows: int = 0


def run(folder: Path, moment: str, name: str, run_dir: Path) -> tuple[int, str]:
    """Run a command to its end; gives its exit code, or minus the signal that ended it, and what it said."""
    command = [*(part.format(float=folder / "float/checkpoints/last.ckpt") for part in COMMANDS[name]), f"run_dir={run_dir}"]
    log = run_dir.with_suffix(".log")
    log.touch()
    before = log.stat().st_size
    pid = os.fork()
    if not pid:
        become(moment, command, os.open(log, os.O_WRONLY | os.O_APPEND))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = log.read_text(errors="replace")[before:]
    if code and (code != -signal.SIGKILL or not moment):
        raise SystemExit(f"{name}, {moment}: exit code {code}\n{text}")
    return code, text


def kill(folder: Path, name: str, number: int, seed: int) -> Killed:
    """Kill a run at moments that are drawn, once in the first round, let it finish, compare it with the whole one."""
    (command, moments), found = KINDS[name], Killed()
    run_dir = folder / re.sub(r"\W+", "_", f"{name} {number}")
    draw = random.Random(f"{seed} {name} {number}")
    for moment in [one(draw) for one in moments[: 1 if number == 0 else None]] + [""]:
        code, text = run(folder, moment, command, run_dir)
        if found.moments:
            found.resumed.append("/".join("".join(groups) for groups in RESUMED.findall(text)) or "0")
        if code:
            found.moments.append(moment)
            found.died += re.findall(r"killed at (step \d+)", text) or ["-"]
        elif not found.moments:
            raise SystemExit(f"{name}: {moment} did not come\n{text}")
    compare(folder / command, run_dir, found)
    return found


def compare(whole: Path, run_dir: Path, found: Killed) -> None:
    """Note what differs between two runs, and that nothing is left over."""
    names = {path.relative_to(whole) for path in _outputs(whole)}
    others = {path.relative_to(run_dir) for path in _outputs(run_dir)}
    found.differing += [f"{name} is in one of them" for name in sorted(map(str, names ^ others))]
    for name in sorted(names & others):
        if name.name in FILES_OF_TORCH:
            files = [whole / name, run_dir / name]
            pairs = [dict(leaves(torch.load(path, weights_only=True), path.parents[len(name.parts) - 1])) for path in files]
            found.values += len(pairs[0])
        elif name.name in TABLES or name.name == "results.json":
            pairs = [dict(rows(whole / name)), dict(rows(run_dir / name))]
            found.rows += len(pairs[0])
        else:
            continue
        keys = sorted(pairs[0].keys() | pairs[1].keys())
        found.differing += [f"{name}: {key}" for key in keys if not same(pairs[0].get(key), pairs[1].get(key))]


def _outputs(run_dir: Path) -> list[Path]:
    """Files of a run, temporary ones too; not what Hydra keeps, nor a checkpoint that only a run of several saves has."""
    found = [path for path in run_dir.rglob("*") if path.is_file() and ".hydra" not in path.parts]
    return [path for path in found if path.suffix not in {".log", ".png", ".svg"} and path.name not in {"last.prev.ckpt", "multirun.yaml"}]


def leaves(value: Any, folder: Path, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of a nested structure; paths are those within the run's folder."""
    if isinstance(value, dict):
        for key, one in value.items():
            if str(key) not in TIMES:
                yield from leaves(one, folder, f"{path}/{str(key).replace(str(folder), '')}")
    elif isinstance(value, list | tuple):
        for key, one in enumerate(value):
            yield from leaves(one, folder, f"{path}/{key}")
    else:
        yield path, value.replace(str(folder), "") if isinstance(value, str) else value


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a table, or entries of a JSON file, without what is measured."""
    text = path.read_text().replace(str(path.parent), "")
    if path.suffix == ".json":
        yield from leaves(json.loads(text), path.parent)
    elif path.suffix == ".jsonl":
        yield from leaves([json.loads(line) for line in text.splitlines()], path.parent)
    else:
        found = [{k: v for k, v in row.items() if v and not MEASURED.match(k)} for row in csv.DictReader(text.splitlines())]
        yield from ((str(number), row) for number, row in enumerate(row for row in found if set(row) - {"epoch", "step"}))


def same(one: Any, other: Any) -> bool:
    """True for equal tensors, bit for bit, and for equal plain values."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25))
    return type(one) is type(other) and (one == other or one != one)


def line(name: str, found: Killed) -> str:
    """A line of the table."""
    places = f"killed at {', '.join(found.died)}; resumed at {', '.join(found.resumed)}"
    differing = f"{len(found.differing)} of {found.values} values and {found.rows} rows differ"
    return f"{name:16} {' + '.join(found.moments):44} {places:44}  {differing}"


def main() -> None:
    """Kill, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="at least so many, and at least a run of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("train", "ptq", "analyze"):
        importlib.import_module(f"qat.tasks.{name}")
    kills, number, differing = 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("float", *dict.fromkeys(KINDS[kind][0] for kind in args.kinds)):
            run(folder, "", name, folder / name)
        while not number or kills < args.kills:
            for name in args.kinds:
                found = kill(folder, name, number, args.seed)
                kills, differing = kills + len(found.moments), differing + len(found.differing)
                print(line(name, found), *(f"    {what}" for what in found.differing[:8]), sep="\n", flush=True)
            number += 1
    print(f"{kills} kills: {differing} differences")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
