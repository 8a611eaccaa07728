"""Kill a training run with SIGKILL at several moments of an epoch, resume it, and count the tensors that differ from an uninterrupted run.

Run by `make kill-resume`. Augmentation, repeated augmentation, mixup, cutmix, dropout, drop path and averaged weights are all on; the
batches are small, so that a moment is between two steps and between two saves.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    *("model.args.embed_dim=48", "model.args.depth=2", "model.args.drop_path_rate=0.2", "+model.args.proj_drop_rate=0.2"),
    *("data.batch_size=16", "data.augment=timm", "data.repeats=3", "data.mixup=0.8", "data.cutmix=1.0"),
    *("callbacks=[default,ema]", "callbacks.ema.decay=0.99", "trainer.max_epochs=2", "checkpoint.every_n_steps=7"),
)
STEPS_OF_KILLS = (10, 60, 100)  # of 156; the moment is a fraction of a second behind the first save from there on
TENSORS = ("state_dict", "current_model_state", "averaging_state")


def start(run_dir: Path, workers: int) -> subprocess.Popen:
    """A training process in the background."""
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, f"run_dir={run_dir}", f"data.num_workers={workers}", "resume=auto"]
    return subprocess.Popen(command, cwd=run_dir.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(run_dir: Path, workers: int) -> None:
    """Run to the end."""
    process = start(run_dir, workers)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)


def last(run_dir: Path) -> dict:
    """The last checkpoint."""
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def kill_behind(step: int, run_dir: Path, workers: int) -> int:
    """Start a run and kill it some time after it saved `step` or a later one; gives the step it will go on from."""
    process = start(run_dir, workers)
    while process.poll() is None:
        if (run_dir / "checkpoints" / "last.ckpt").exists() and last(run_dir)["global_step"] >= step:
            break
        time.sleep(0.01)
    time.sleep(0.05 + step % 7 * 0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode != -signal.SIGKILL:
        raise SystemExit("the run ended before it was killed")
    return int(last(run_dir)["global_step"])


def differing(run_dir: Path, full: Path) -> tuple[int, int]:
    """Tensors that differ, and all."""
    ours, theirs = last(run_dir), last(full)
    pairs = [(ours[key][name], value) for key in TENSORS for name, value in theirs[key].items()]
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (ours, theirs)]
    pairs += [(moments[0][i][key], value) for i, state in moments[1].items() for key, value in state.items()]
    return sum(not torch.equal(a, b) for a, b in pairs), len(pairs)


def main() -> None:
    """Print a line for every kill."""
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "full"
        finish(full, 0)
        print(f"uninterrupted run: {last(full)['global_step']} steps")
        for workers in (0, 2):
            for step in STEPS_OF_KILLS:
                run_dir = Path(folder) / f"workers{workers}_{step}"
                resumed_at = kill_behind(step, run_dir, workers)
                finish(run_dir, workers)
                wrong, number = differing(run_dir, full)
                print(f"workers {workers}, killed behind step {resumed_at}: {wrong} of {number} tensors differ", flush=True)


if __name__ == "__main__":
    main()
