"""Kill commands at random moments, run them again, and compare all files with undisturbed runs.

Run it with `make stress`; its log is `evidence/logs/stress.log`. Training runs use augmentation,
repeated augmentation, mixup, cutmix, dropout, drop path and averaged weights. A command is killed
with SIGKILL after a random call of a function in `CALLS`; after `torch.save`, half of the file is
on the disk. All tensors and numbers of checkpoints, the rows of tables, `results.json` and the
names of files are compared, without measurements (times, throughput). Each run is a fork of this
process, which has imported everything. The exit code is 1 if anything differs.
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
from typing import Any, NoReturn

import torch

from qat.lit import QATModule
from qat.ptq.search import Evaluator

ROOT = Path(__file__).resolve().parents[1]
# An epoch has 19 steps; `last.ckpt` is written 17 times.
TRAIN = (
    "train.py",
    "model.args.embed_dim=24",
    "model.args.depth=1",
    "++model.args.num_heads=3",
    "+model.args.drop_path_rate=0.2",
    "+model.args.proj_drop_rate=0.2",
    "report=false",
    "data.batch_size=64",
    "data.augment=timm",
    "data.repeats=2",
    "data.mixup=0.8",
    "data.cutmix=1.0",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=2",
    "checkpoint.every_n_steps=4",
    "callbacks.ema.decay=0.9",
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
    (QATModule, "training_step"),
    (QATModule, "validation_step"),
    (QATModule, "configure_gradient_clipping"),
    (Evaluator, "fitness"),
    (torch, "save"),
    (os, "link"),
    (os, "replace"),
)
# Measurements differ between runs; rows of a search end with seconds. `current_score` differs
# because Lightning does not restore it, but it has no effect.
MEASURED = re.compile(
    r"(train|validate|test)/(time|batches|samples|device)|throughput/|seconds$|time_elapsed$"
    r"|finished$|versions/|git_commit$|search.ckpt/rows/\d+/5$|/current_score$"
)
SHOWN = 8
# The name of a function, and the number of calls after which the process is killed.
Moment = tuple[str, int]


def watch(moment: Moment | None, counts: Counter[str]) -> None:
    """Count calls, and kill this process at the given moment."""

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
    folder: Path, name: str, run_dir: Path, moment: Moment | None = None
) -> Counter[str] | None:
    """Run a command in a fork.

    Args:
        folder: folder of all runs.
        name: key of `COMMANDS`.
        run_dir: folder of this run.
        moment: moment at which the command is killed; None = never.

    Returns:
        Number of calls by name; None if the command was killed.
    """
    float_weights = folder / "float/checkpoints/last.ckpt"
    arguments = [part.format(float=float_weights) for part in COMMANDS[name]]
    log = run_dir.with_suffix(".log")
    counts_file = run_dir.with_suffix(".counts")
    pid = os.fork()
    if not pid:
        _run_and_exit([*arguments, f"run_dir={run_dir}"], moment, log, counts_file)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in {0, -signal.SIGKILL}:
        raise SystemExit(f"{name}, {moment}: exit code {code}\n{log.read_text(errors='replace')}")
    return Counter(json.loads(counts_file.read_text())) if code == 0 else None


def _run_and_exit(
    command: list[str], moment: Moment | None, log: Path, counts_file: Path
) -> NoReturn:
    """Run a script in this process, with its output in `log`, and end the process."""
    code = 1
    counts = Counter[str]()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
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
        counts_file.write_text(json.dumps(counts))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def values(run_dir: Path) -> Iterator[tuple[str, Any]]:
    """All values in the files of a run, by file and position.

    Hydra's files, and the checkpoint that only exists after several saves, are left out.
    """
    for path in sorted(run_dir.rglob("*")):
        if not path.is_file() or ".hydra" in path.parts:
            continue
        if path.suffix in {".log", ".png", ".svg"}:
            continue
        if path.name in {"last.prev.ckpt", "multirun.yaml"}:
            continue
        name = str(path.relative_to(run_dir))
        yield name, True
        yield from leaves(_content(path), str(run_dir), name)


def _content(path: Path) -> Any:
    if path.suffix == ".ckpt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".csv":
        return _rows_without_measurements(path)
    return ()


def _rows_without_measurements(path: Path) -> list[dict[str, str]]:
    """Rows of a table, without measurements; rows with no other value are left out."""
    rows = []
    for row in csv.DictReader(path.open()):
        cells = {key: cell for key, cell in row.items() if cell and not MEASURED.search(key)}
        if cells.keys() - {"epoch", "step"}:
            rows.append(cells)
    return rows


def leaves(value: Any, folder: str, path: str) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of a nested structure, without the name of the run's folder."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield from leaves(child, folder, f"{path}/{str(key).replace(folder, '')}")
    elif not MEASURED.search(path):
        yield path, value.replace(folder, "") if isinstance(value, str) else value


def same(first: Any, second: Any) -> bool:
    """True for equal tensors, bit for bit, and for equal plain values."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype:
            return False
        return torch.equal(first.nan_to_num(7.25), second.nan_to_num(7.25))
    return type(first) is type(second) and (
        first == second or (first != first and second != second)
    )


def disturbed_run(
    folder: Path, name: str, run_dir: Path, counts: Counter[str], draw: random.Random
) -> list[str]:
    """Kill a command once or twice, then run it to its end.

    Args:
        folder: folder of all runs.
        name: key of `COMMANDS`.
        run_dir: folder of this run.
        counts: calls of an undisturbed run.
        draw: random generator of the moments.

    Returns:
        The moments in words.
    """
    moments = []
    for _ in range(draw.randint(1, 2)):
        call = draw.choice(sorted(counts))
        number = draw.randint(1, counts[call])
        if run(folder, name, run_dir, (call, number)) is not None:
            break  # the resumed run ended before the moment
        moments.append(f"{call} {number}")
    run(folder, name, run_dir)
    return moments


def main() -> None:
    """Kill and repeat commands, compare the results, and print a line for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=20, help="least number of kills; each kind runs at least once"
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
    draw = random.Random(args.seed)
    num_kills = 0
    num_differences = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        counts = {}
        for name in dict.fromkeys(("float", *args.kinds)):
            counts[name] = run(folder, name, folder / name) or Counter()
        expected = {name: dict(values(folder / name)) for name in args.kinds}
        while num_kills < args.kills:
            for name in args.kinds:
                run_dir = folder / f"{name}-{num_kills}"
                moments = disturbed_run(folder, name, run_dir, counts[name], draw)
                actual = dict(values(run_dir))
                differing = []
                for key in expected[name].keys() | actual:
                    if not same(expected[name].get(key), actual.get(key)):
                        differing.append(key)
                num_kills += len(moments)
                num_differences += len(differing)
                print(
                    f"{name:10} killed after {', '.join(moments)}: "
                    f"{len(differing)} of {len(actual)} values differ"
                )
                for key in sorted(differing)[:SHOWN]:
                    print(f"    {key}")
                sys.stdout.flush()
    print(f"{num_kills} kills: {num_differences} differences")
    raise SystemExit(bool(num_differences))


if __name__ == "__main__":
    main()
