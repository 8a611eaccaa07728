"""How long the commands take until they answer, and until the first training step begins; what the libraries have of it.

Run by `make startup`: each command in a process of its own, all of them in turns, medians of five. Seconds of the wall clock and of the
processor; the step is that of the digits demo, without loader processes.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lightning.pytorch import Callback

from benchmarks.kure_cost import machine

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "python -c 'import qat'": ["-c", "import qat"],
    **{f"python {name}.py --help": [f"{name}.py", "--help"] for name in ("train", "eval", "ptq", "analyze")},
    "python train.py --cfg job": ["train.py", "--cfg", "job"],
    "python -c 'import torch'": ["-c", "import torch"],
    "python -c 'import torch, timm, lightning.pytorch'": ["-c", "import torch, timm, lightning.pytorch"],
    "all that a run imports": ["-c", "import qat.tasks.train"],
}
RUN = ["train.py", "trainer.fast_dev_run=true", "+callbacks.first_step._target_=benchmarks.startup.FirstStep"]
RUNS = {"first step of train.py trainer.fast_dev_run=true": RUN, "first step, compile=true": [*RUN, "compile=true"]}
MARK = "QAT_FIRST_STEP"
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w]+)")


class FirstStep(Callback):
    """Writes down when the first training step begins."""

    def on_train_batch_start(self, *_: object) -> None:
        """Of the first batch."""
        Path(os.environ[MARK]).write_text(repr(time.time()))


def timed(arguments: list[str], mark: Path) -> tuple[float, float]:
    """Seconds until the process ends, or until its mark where it leaves one, and processor seconds of all of it."""
    mark.unlink(missing_ok=True)
    before, began = os.times(), time.time()
    environment = {**os.environ, MARK: str(mark), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=True, capture_output=True)
    ended, after = time.time(), os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return (float(mark.read_text()) if mark.exists() else ended) - began, used


def libraries(code: str) -> list[tuple[str, float]]:
    """Seconds that an import spends in the modules of each library, longest first."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    total: collections.Counter[str] = collections.Counter()
    for microseconds, name in IMPORT.findall(done.stderr):
        total[name] += int(microseconds)
    return [(name, value / 1e6) for name, value in total.most_common()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="time compile=true too")
    options = parser.parse_args()
    runs = RUNS if options.compiled else dict(list(RUNS.items())[:1])
    found: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name, arguments in COMMANDS.items():
                found[name].append(timed(arguments, Path(folder, "mark")))
            for name, arguments in runs.items():
                where = f"run_dir={folder}/{name.replace(' ', '_').replace('=', '_')}_{number}"
                found[name].append(timed([*arguments, where], Path(folder, "mark")))
    print(f"| medians of {options.rounds} | wall, s | processor, s |\n|---|---|---|")
    for name, pairs in found.items():
        wall, used = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| `{name}` | {wall:.2f} | {used:.2f} |")
    most = ", ".join(f"{name} {seconds:.2f}" for name, seconds in libraries("import qat.tasks.train")[:12])
    print(f"seconds in modules of each library, python -X importtime: {most}")


if __name__ == "__main__":
    main()
