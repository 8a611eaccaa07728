"""Kill commands with SIGKILL at moments drawn with a seed, run them again, and compare everything with runs that were not killed.

Run by `make stress`; log `docs/logs/stress.log`. Augmentation, repeated augmentation, mixup, cutmix, dropout, drop path and averaged
weights are on in training. Compared are all tensors and numbers of `last.ckpt`, `best.ckpt`, `quantized.ckpt` and `search.ckpt`, the rows
of the tables, `results.json`, and which files there are; what is measured of the present process (times, throughput) is left out. Exit
code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from stress_ranks import seconds_to_go, strike

ROOT = Path(__file__).resolve().parents[1]
NET = ("model.args.embed_dim=24", "model.args.depth=1", "++model.args.num_heads=3")
TRAIN = (
    *("train.py", *NET, "+model.args.drop_path_rate=0.2", "+model.args.proj_drop_rate=0.2", "report=false"),
    *("data.batch_size=64", "data.augment=timm", "data.repeats=2", "data.mixup=0.8", "data.cutmix=1.0"),
    *("trainer.max_epochs=3", "trainer.log_every_n_steps=2", "checkpoint.every_n_steps=4", "callbacks.ema.decay=0.9", "resume=auto"),
)
SMALL = ("data.calibration_images=40", "ptq.batch=20", "report=false", "resume=auto")
# 19 steps an epoch, by accumulation 10; `last.ckpt` is written 17 times.
COMMANDS: dict[str, tuple[str, ...]] = {
    "float": (*TRAIN, "callbacks=[default,ema]", "quant=fp", "trainer.max_epochs=1", "model.args.depth=2"),
    "averaged": (*TRAIN, "callbacks=[default,ema]"),
    "annealed": (
        *(*TRAIN, "callbacks=[default,cga,ema]"),
        *("callbacks.cga.start_epoch=1", "callbacks.cga.boundary_range=0.1", "callbacks.cga.qk=product"),
    ),
    "frozen": (
        *(*TRAIN, "callbacks=[default,freeze,oscillation,ema]"),
        *("callbacks.freeze.momentum=0.1", "callbacks.freeze.threshold=0.3", "callbacks.freeze.final_threshold=0.2"),
    ),
    "accumulated": (
        *(*TRAIN, "callbacks=[default,oscillation,ema]", "checkpoint.every_n_steps=3"),
        *("trainer.accumulate_grad_batches=2", "+trainer.val_check_interval=6"),
    ),
    "parallel": (*TRAIN, "callbacks=[default,ema]", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
    "sweep": ("train.py", "-m", *TRAIN[1:], "callbacks=[default,ema]", "trainer.max_epochs=1", "quant=ofq_2bit,lsq_4bit", "seed=0,1"),
    "evolq": ("ptq.py", "ckpt={float}", "search=evolution", "search.passes=2", "search.cycles=3", "search.radius=0.05", *SMALL),
    "analysis": (
        *("analyze.py", "ckpt={float}", "analysis=sensitivity", "analysis.measures=[bits]", "analysis.bits=[2,8]"),
        *("images=40", "split=val", "report=false", "resume=auto"),
    ),
}
FILES_OF_TORCH = ("last.ckpt", "best.ckpt", "quantized.ckpt", "search.ckpt")
TABLES = ("metrics.csv", "search.csv", "front.csv", "oscillation.csv", "points.jsonl", "sensitivity.csv")
MEASURED = re.compile(r"(train|validate|test)/(time|batches|samples|device)|throughput/|seconds")
TIMES = ("wall_seconds", "finished", "seconds", "versions", "git_commit", "num_workers")

Draw = Callable[[random.Random], str]


def ranks(who: str) -> Draw:
    """Processes of a run that has several, at a time drawn behind a save."""
    return lambda draw: f"ranks:{who}:{draw.uniform(0, 0.4):.2f}"


def _who(share: str) -> tuple[str, float]:
    who, _, seconds = share.partition(":")
    return who, float(seconds)


def among(*moments: str, most: int = 1, least: int = 1) -> Draw:
    """One of some moments, at a number drawn between two."""
    return lambda draw: f"{draw.choice(moments)}:{draw.randint(least, most)}"


@dataclass(frozen=True)
class Kind:
    """Runs that are killed at one sort of moment; `at` is a share of the time that a whole run takes.

    Attributes:
        command: of `COMMANDS`.
        moments: of the kills of one run, one after the other; the last of them may come too late.
        settings: for the killed runs only, which must change nothing.
    """

    command: str
    moments: Sequence[Draw]
    settings: Sequence[str] = ()


WRITING = ("half:last.ckpt", "linked", "complete:last.prev.ckpt", "replaced:last.prev.ckpt", "complete:last.ckpt", "replaced:last.ckpt")
SEARCHING = ("half:search.ckpt", "replaced:search.ckpt", "torn:search.csv")
STEP = among("forward", "update", least=2, most=50)
KINDS: dict[str, Kind] = {
    "step": Kind("averaged", [STEP]),
    "step, 2 workers": Kind("averaged", [STEP, among("forward", "update", most=10)], ("data.num_workers=2",)),
    "last.ckpt": Kind("averaged", [among(*WRITING, least=2, most=12), among(*WRITING, most=3)]),
    "best.ckpt": Kind("averaged", [among("half:best.ckpt", "complete:best.ckpt", "replaced:best.ckpt")]),
    "metrics.csv": Kind("averaged", [among("torn:metrics.csv", "complete:metrics.csv", least=2, most=8)]),
    "validation": Kind("averaged", [among("validation", most=9)], ("data.num_workers=2",)),
    "epoch end": Kind("averaged", [among("epoch_end", most=3)]),
    "cga": Kind("annealed", [among("forward", "update", least=19, most=54), among(*WRITING, most=3)]),
    "freeze": Kind("frozen", [among("forward", "update", *WRITING, least=2, most=12), among("forward", most=12)]),
    "end of freeze": Kind("frozen", [among("replaced:last.ckpt", least=17, most=17)]),
    "accumulation": Kind("accumulated", [among("forward", "validation", least=2, most=16), among("forward", most=6)]),
    "anywhere": Kind("frozen", [lambda draw: f"at:{draw.uniform(0.3, 0.95):.2f}", lambda draw: f"at:{draw.uniform(0.3, 0.95):.2f}"]),
    "first process": Kind("parallel", [ranks("0"), ranks("main")]),
    "second process": Kind("parallel", [ranks("1"), ranks("0+1")]),
    "main process": Kind("parallel", [ranks("main"), ranks("1")]),
    "sweep": Kind("sweep", [among("forward", least=20, most=35), among("replaced:last.ckpt", least=5, most=9)]),
    "evolq": Kind("evolq", [among("candidate", least=3, most=12), among(*SEARCHING, most=2)]),
    "analysis": Kind("analysis", [among("torn:points.jsonl", least=2, most=8), among("complete:sensitivity.csv")]),
}


@dataclass
class Killed:
    """What became of a run.

    Attributes:
        moments: at which it was killed.
        died: the steps of the kills, as far as there are steps.
        resumed: where it went on.
        differing: what differs from the run that was not killed.
        compared: how many tensors and rows were compared.
    """

    moments: list[str] = field(default_factory=list)
    died: list[tuple[str, str]] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    compared: int = 0
    rows: int = 0


class Runner:
    """Runs commands in the background, what they say in a file.

    Args:
        folder: for everything.
        fork: copies of this process, which has imported everything, in the place of new interpreters.
    """

    def __init__(self, folder: Path, *, fork: bool) -> None:
        self.folder, self.fork = folder, fork
        self.seconds: dict[str, float] = {}

    def command(self, name: str, run_dir: Path) -> list[str]:
        """Script and arguments."""
        found = [part.format(float=self.folder / "float/checkpoints/last.ckpt") for part in COMMANDS[name]]
        return [*found, f"run_dir={run_dir}"]

    def start(self, moment: str, command: Sequence[str], log: Path) -> int:
        """Start a command; gives the process id."""
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        if not self.fork:
            child = [sys.executable, str(ROOT / "benchmarks/stress_moments.py"), moment, *command]
            actions = [(os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
            return os.posix_spawn(sys.executable, child, os.environ, file_actions=actions)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            _become(moment, command, os.open(log, flags))
        return pid

    def run(self, moment: str, name: str, run_dir: Path, settings: Sequence[str] = ()) -> tuple[int, str]:
        """Run a command to its end; gives its exit code, or minus the signal that ended it, and what it said."""
        kind, _, share = moment.partition(":")
        log = run_dir.with_suffix(".log")
        before = log.stat().st_size if log.exists() else 0
        pid = self.start("" if kind in {"at", "ranks"} else moment, [*self.command(name, run_dir), *settings], log)
        if kind == "at":
            time.sleep(float(share) * self.seconds[name])
            os.kill(pid, signal.SIGKILL)
        below = strike(pid, *_who(share), run_dir) if kind == "ranks" else {}
        began = time.monotonic()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text = log.read_text(errors="replace")[before:]
        seconds_to_go(list(below))
        return code, text + (f"\nall gone after {time.monotonic() - began:.1f} s\n" if below else "")

    def finish(self, name: str, run_dir: Path, settings: Sequence[str] = ()) -> str:
        """Run to the end; gives what the run said."""
        code, text = self.run("", name, run_dir, settings)
        if code:
            raise SystemExit(f"{name}: exit code {code}\n{text}")
        return text

    def whole(self, name: str) -> None:
        """The run that is not killed."""
        began = time.monotonic()
        self.finish(name, self.folder / name)
        self.seconds[name] = time.monotonic() - began


def _become(moment: str, command: Sequence[str], out: int) -> NoReturn:
    """Be the command, in a process of its own."""
    import stress_moments

    code: Any = 1
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        stress_moments.run(moment, command[0], list(command[1:]))
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def kill(runner: Runner, name: str, number: int, seed: int) -> Killed:
    """Kill a run at moments that are drawn, once in the first round, let it finish, compare it with the whole one."""
    kind, run_dir, found = KINDS[name], runner.folder / re.sub(r"\W+", "_", f"{name} {number}"), Killed()
    draw = random.Random(f"{seed} {name} {number}")
    for one in kind.moments[: 1 if number == 0 else None]:
        moment = one(draw)
        code, text = runner.run(moment, kind.command, run_dir, kind.settings)
        while not code and moment.startswith("at:") and not found.moments:  # the machine has less to do than it had before
            shutil.rmtree(run_dir)
            moment = f"at:{float(moment[3:]) / 2:.2f}"
            code, text = runner.run(moment, kind.command, run_dir, kind.settings)
        found.resumed += _resumed(text) if found.moments else []
        if code == -signal.SIGKILL or (moment.startswith("ranks") and code > 0 and len(re.findall("^error: ", text, re.MULTILINE)) == 1):
            found.moments.append(moment)
            found.died += re.findall(r"killed at (step \d+)|(all gone after .*)", text) or [("-", "")]
        elif code or not found.moments:
            raise SystemExit(f"{name}, {moment}: exit code {code} in the place of a kill\n{text}")
    found.resumed += _resumed(runner.finish(kind.command, run_dir, kind.settings))
    compare(runner.folder / kind.command, run_dir, found)
    return found


def _resumed(text: str) -> list[str]:
    patterns = r"resumed at step (\d+)|resumed after (\d+)|\((\d+) done before\)"
    return ["/".join("".join(groups) for groups in re.findall(patterns, text)) or "0"]


def compare(whole: Path, run_dir: Path, found: Killed) -> None:
    """Note what differs between two runs, and that nothing is left over."""
    names = {path.relative_to(whole) for path in _outputs(whole)}
    others = {path.relative_to(run_dir) for path in _outputs(run_dir)}
    found.differing += [f"{name} is in one of them" for name in sorted(map(str, names ^ others))]
    for name in sorted(names & others):
        ours, theirs = run_dir / name, whole / name
        if name.name in FILES_OF_TORCH:
            pairs = [dict(leaves(torch.load(path, weights_only=True), path.parents[len(name.parts) - 1])) for path in (ours, theirs)]
            found.compared += len(pairs[1])
        elif name.name in TABLES or name.name == "results.json":
            pairs = [dict(rows(path)) for path in (ours, theirs)]
            found.rows += len(pairs[1])
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
        for number, line in enumerate(text.splitlines()):
            yield from leaves(json.loads(line), path.parent, str(number))
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
    differing = f"{len(found.differing)} of {found.compared} values and {found.rows} rows differ"
    places = f"killed at {', '.join(''.join(words) for words in found.died)}; resumed at {', '.join(found.resumed)}"
    return f"{name:16} {' + '.join(found.moments):44} {places:44} {differing}"


def arguments() -> argparse.Namespace:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="at least so many, and at least a run of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--fork", action="store_true", help="copies of one interpreter, a run at a time: a fraction of the work")
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which stay there")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> Callable[..., Iterable[Any]]:
    """Threads to one a process, imports where they are shared; gives what maps a function over its arguments."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if not args.fork:
        return ThreadPoolExecutor(args.jobs).map
    for name in ("train", "ptq", "analyze"):
        importlib.import_module(f"qat.tasks.{name}")
    return map


def stress(args: argparse.Namespace, folder: Path) -> list[str]:
    """Print a line for every run that was killed; gives all that differs."""
    runner, mapped = Runner(folder, fork=args.fork), prepare(args)
    names = list(dict.fromkeys(KINDS[name].command for name in args.kinds))
    if any("{float}" in " ".join(COMMANDS[name]) for name in names):
        runner.whole("float")
    list(mapped(runner.whole, names))
    kills, number, failed = 0, 0, []
    while not number or kills < args.kills:
        round_of = partial(kill, runner, number=number, seed=args.seed)
        for name, found in zip(args.kinds, mapped(round_of, args.kinds), strict=True):
            kills += len(found.moments)
            failed += found.differing
            print(line(name, found), *(f"    {what}" for what in found.differing[:8]), sep="\n", flush=True)
        number += 1
    print(f"{kills} kills: {len(failed)} differences")
    return failed


def main() -> None:
    """Kill, compare, tell."""
    args = arguments()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        raise SystemExit(bool(stress(args, folder)))


if __name__ == "__main__":
    main()
