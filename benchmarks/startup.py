"""How long the commands take until they answer, and until the first training step begins.

Run by `make startup`: each command in a process of its own, all of them in turns, medians of five. Seconds of the wall clock and of the
processor; the step is that of the digits demo, without loader processes. Which library they go to: `python -X importtime -c "import ..."`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lightning.pytorch import Callback

from benchmarks.timing import machine, table

ROOT = Path(__file__).parents[1]
RUN = ["train.py", "trainer.fast_dev_run=true", "+callbacks.first_step._target_=benchmarks.startup.FirstStep"]
COMMANDS = {
    "python -c 'import qat'": ["-c", "import qat"],
    **{f"python {name}.py --help": [f"{name}.py", "--help"] for name in ("train", "eval", "ptq", "analyze")},
    "python train.py --cfg job": ["train.py", "--cfg", "job"],
    "python -c 'import torch'": ["-c", "import torch"],
    "python -c 'import torch, timm, lightning.pytorch'": ["-c", "import torch, timm, lightning.pytorch"],
    "first step of train.py trainer.fast_dev_run=true": RUN,
}
MARK = "QAT_FIRST_STEP"


class FirstStep(Callback):
    """Writes down when the first training step begins."""

    def on_train_batch_start(self, *_: object) -> None:
        """Of the first batch."""
        Path(os.environ[MARK]).write_text(repr(time.time()))


def timed(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Seconds until the process ends, or until its mark where it leaves one, and processor seconds of all of it."""
    mark = folder / "mark"
    mark.unlink(missing_ok=True)
    own = [f"run_dir={tempfile.mkdtemp(dir=folder)}"] if arguments[0].endswith(".py") and "=" in arguments[-1] else []
    before, began = os.times(), time.time()
    environment = {**os.environ, MARK: str(mark), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *arguments, *own], cwd=ROOT, env=environment, check=True, capture_output=True)
    ended, after = time.time(), os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return (float(mark.read_text()) if mark.exists() else ended) - began, used


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        found = [[timed(arguments, Path(folder)) for arguments in COMMANDS.values()] for _ in range(rounds)]
    columns = zip(*found, strict=True)
    rows = [
        [f"`{name}`", *(f"{statistics.median(seconds):.2f}" for seconds in zip(*pairs, strict=True))]
        for name, pairs in zip(COMMANDS, columns, strict=True)
    ]
    print(machine())
    print(table([f"medians of {rounds}", "wall, s", "processor, s"], rows))


if __name__ == "__main__":
    main()
