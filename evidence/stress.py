"""Kill commands with SIGKILL at moments drawn with a seed, run them again, and compare all files with those of runs that were not killed.

Run by `make stress`; log `evidence/logs/stress.log`. Augmentation, repeated augmentation, mixup, cutmix, dropout, drop path and averaged
weights are on in training. A moment is after one of some calls (`CALLS`); of `torch.save` half a file is on the disk then.
Compared are all tensors and numbers of checkpoints, the rows of tables, `results.json`, and which files there are; what is measured (times,
throughput) is left out. Each run is a fork of this process, which has imported everything. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import re
import runpy
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qat.lit import QATModule
from qat.ptq.search import Evaluator

ROOT = Path(__file__).resolve().parents[1]
# 19 steps an epoch; `last.ckpt` is written 17 times.
TRAIN = (
    *(
        "train.py",
        "model.args.embed_dim=24",
        "model.args.depth=1",
        "++model.args.num_heads=3",
        "+model.args.drop_path_rate=0.2",
    ),
    *(
        "+model.args.proj_drop_rate=0.2",
        "report=false",
        "data.batch_size=64",
        "data.augment=timm",
        "data.repeats=2",
        "data.mixup=0.8",
    ),
    *(
        "data.cutmix=1.0",
        "trainer.max_epochs=3",
        "trainer.log_every_n_steps=2",
        "checkpoint.every_n_steps=4",
        "callbacks.ema.decay=0.9",
    ),
    "resume=auto",
)
CGA = (
    "callbacks.cga.start_epoch=1",
    "callbacks.cga.boundary_range=0.1",
    "callbacks.cga.qk=product",
)
FREEZE = (
    "callbacks.freeze.momentum=0.1",
    "callbacks.freeze.threshold=0.3",
    "callbacks.freeze.final_threshold=0.2",
)
PTQ = (
    "ptq.py",
    "ckpt={float}",
    "data.calibration_images=40",
    "ptq.batch=20",
    "report=false",
    "resume=auto",
)
COMMANDS = {
    "float": (
        *TRAIN,
        "callbacks=[default,ema]",
        "quant=fp",
        "trainer.max_epochs=1",
        "model.args.depth=2",
    ),
    "annealed": (*TRAIN, "callbacks=[default,cga,ema]", *CGA),
    "frozen": (
        *TRAIN,
        "callbacks=[default,freeze,oscillation,ema]",
        *FREEZE,
        "trainer.accumulate_grad_batches=2",
    ),
    "sweep": (
        "train.py",
        "-m",
        *TRAIN[1:],
        "callbacks=[default,ema]",
        "trainer.max_epochs=1",
        "quant=ofq_2bit,lsq_4bit",
        "seed=0,1",
    ),
    "evolq": (*PTQ, "search=evolution", "search.passes=2", "search.cycles=3", "search.radius=0.05"),
}
CALLS: tuple[tuple[Any, str], ...] = (
    *(
        (QATModule, "training_step"),
        (QATModule, "validation_step"),
        (QATModule, "configure_gradient_clipping"),
    ),
    *((Evaluator, "fitness"), (torch, "save"), (os, "link"), (os, "replace")),
)
# What is measured; a search's rows end with seconds. Lightning does not restore `current_score`, and nothing reads it.
MEASURED = re.compile(
    r"(train|validate|test)/(time|batches|samples|device)|throughput/|seconds$|time_elapsed$|finished$|versions/|git_commit$|search.ckpt/rows/\d+/5$|/current_score$"
)


def watch(moment: tuple[str, int] | None, counts: Counter[str]) -> None:
    """Count calls; die after one: its name, and which of them."""

    def watched(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            result = function(*args, **options)
            if moment == (name, counts[name]):
                if name == "save":
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for owner, name in CALLS:
        setattr(owner, name, watched(name, getattr(owner, name)))


def run(
    folder: Path, name: str, run_dir: Path, moment: tuple[str, int] | None = None
) -> Counter[str] | None:
    """Run a command; gives how often each call was made, None if it was killed."""
    command = [
        *(part.format(float=folder / "float/checkpoints/last.ckpt") for part in COMMANDS[name]),
        f"run_dir={run_dir}",
    ]
    log, told, pid = run_dir.with_suffix(".log"), run_dir.with_suffix(".counts"), os.fork()
    if not pid:
        code, counts = 1, Counter[str]()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            sys.argv = [str(ROOT / command[0]), *command[1:]]
            watch(moment, counts)
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            told.write_text(json.dumps(counts))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in {0, -signal.SIGKILL}:
        raise SystemExit(f"{name}, {moment}: exit code {code}\n{log.read_text(errors='replace')}")
    return Counter(json.loads(told.read_text())) if code == 0 else None


def values(run_dir: Path) -> Iterator[tuple[str, Any]]:
    """All that a run left, by file and place in it; not what Hydra keeps, nor a checkpoint that only a run of several saves has."""
    for path in sorted(
        path for path in run_dir.rglob("*") if path.is_file() and ".hydra" not in path.parts
    ):
        name = str(path.relative_to(run_dir))
        if path.suffix in {".log", ".png", ".svg"} or path.name in {
            "last.prev.ckpt",
            "multirun.yaml",
        }:
            continue
        yield name, True
        found: Any = ()
        if path.suffix == ".ckpt":
            found = torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            found = json.loads(path.read_text())
        elif path.suffix == ".csv":
            rows = (
                {k: v for k, v in row.items() if v and not MEASURED.search(k)}
                for row in csv.DictReader(path.open())
            )
            found = [row for row in rows if row.keys() - {"epoch", "step"}]
        yield from leaves(found, str(run_dir), name)


def leaves(value: Any, folder: str, path: str) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of a nested structure; paths are those within the run's folder."""
    if isinstance(value, dict | list | tuple):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, folder, f"{path}/{str(key).replace(folder, '')}")
    elif not MEASURED.search(path):
        yield path, value.replace(folder, "") if isinstance(value, str) else value


def same(one: Any, other: Any) -> bool:
    """True for equal tensors, bit for bit, and for equal plain values."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(
            one.nan_to_num(7.25), other.nan_to_num(7.25)
        )
    return type(one) is type(other) and (one == other or one != one)


def main() -> None:
    """Kill, compare, print a line for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=20, help="at least so many, and at least a run of each kind"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=[name for name in COMMANDS if name != "float"],
        choices=COMMANDS,
    )
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("train", "ptq"):
        importlib.import_module(f"qat.tasks.{name}")
    draw, kills, wrong = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        counts = {
            name: run(folder, name, folder / name) or Counter()
            for name in dict.fromkeys(("float", *args.kinds))
        }
        expected = {name: dict(values(folder / name)) for name in args.kinds}
        while kills < args.kills:
            for name in args.kinds:
                run_dir, moments = folder / f"{name}-{kills}", []
                for _ in range(draw.randint(1, 2)):
                    call = draw.choice(sorted(counts[name]))
                    moment = call, draw.randint(1, counts[name][call])
                    if run(folder, name, run_dir, moment) is not None:
                        break  # resumed, it came to its end before
                    moments.append(f"{call} {moment[1]}")
                run(folder, name, run_dir)
                found = dict(values(run_dir))
                differing = [
                    key
                    for key in expected[name].keys() | found
                    if not same(expected[name].get(key), found.get(key))
                ]
                kills, wrong = kills + len(moments), wrong + len(differing)
                said = f"{name:10} killed after {', '.join(moments)}: {len(differing)} of {len(found)} values differ"
                print(
                    said, *(f"    {what}" for what in sorted(differing)[:8]), sep="\n", flush=True
                )
    print(f"{kills} kills: {wrong} differences")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
