"""What annealing does to accuracy and oscillation: a 2-bit net goes on for some epochs with and without it, over seeds.

Run by `make cga-seeds`. Both arms start from the same checkpoint with its optimizer state, at the same constant learning rate; they differ
in the callback alone. Prints a table and draws the share of oscillating weights over the steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
FIGURE_COLUMNS = ("osc/share", "osc/band")
ARMS = {
    "without": ("callbacks=[default,oscillation]",),
    "cga": ("callbacks=[default,cga,oscillation]", "callbacks.cga.start_epoch=0"),
    "cga, qk=product": ("callbacks=[default,cga,oscillation]", "callbacks.cga.start_epoch=0", "callbacks.cga.qk=product"),
    "cga, qk=freeze": ("callbacks=[default,cga,oscillation]", "callbacks.cga.start_epoch=0", "callbacks.cga.qk=freeze"),
}
SETS = {
    "digits": (),
    # Patches of 8 pixels and a quarter of the images an epoch: what two cores can do.
    "cifar10": ("data=cifar10", "data.patch_size=8", "model.args.depth=6", "trainer.limit_train_batches=0.25", "data.num_workers=0"),
}


def train(run_dir: Path, *settings: str) -> dict:
    """Run one training and give its results; a finished one is not run again."""
    results = run_dir / "results.json"
    if not results.exists():
        command = [sys.executable, str(ROOT / "train.py"), f"run_dir={run_dir}", "resume=auto", *settings]
        print("+", " ".join(["python", "train.py", *command[2:]]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(results.read_text())


def totals(run_dir: Path) -> dict[str, float]:
    """The last row of `oscillation.csv`, as shares in percent."""
    *_, total = csv.DictReader((run_dir / "oscillation.csv").open())
    weights = float(total["weights"])
    return {key: 100 * float(total[key]) / weights for key in ("oscillating", "in_band")} | {"flips": float(total["flips"]) / 1000}


def course(run_dir: Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of `metrics.csv`."""
    rows = [row for row in csv.DictReader((run_dir / "metrics.csv").open()) if row.get(column)]
    return [int(row["step"]) for row in rows], [100 * float(row[column]) for row in rows]


def run_seed(folder: Path, seed: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Float net, 2-bit net, then every arm; figures by arm."""
    shared = (*SETS[args.data], f"seed={seed}", *([f"data.root={args.root}"] if args.root else []))
    fp, qat = folder / f"seed{seed}" / "fp", folder / f"seed{seed}" / "qat"
    train(fp, *shared, "quant=fp", f"trainer.max_epochs={args.epochs}", "optimizer.lr=3e-3", "scheduler.warmup_epochs=2")
    start = f"ckpt={fp}/checkpoints/best.ckpt"
    learn = ("loss=kd", "data.augment=none")
    train(qat, *shared, start, *learn, f"trainer.max_epochs={args.epochs}", "callbacks=[default,oscillation]")
    found = {"start": {"top1": results_of(qat, "final"), **totals(qat)}}
    go_on = (f"ckpt={qat}/checkpoints/last.ckpt", "ckpt_optimizer=true", f"teacher.ckpt={fp}/checkpoints/best.ckpt", *learn)
    rate = f"{args.rate:g}"
    constant = (f"optimizer.lr={rate}", f"scheduler.min_lr={rate}", "callbacks.best=null", f"trainer.max_epochs={args.arm_epochs}")
    for arm, settings in ARMS.items():
        run_dir = arm_dir(folder, seed, arm, args)
        own_rate = (f"callbacks.cga.lr={rate}",) if "cga" in arm else ()
        done = train(run_dir, *shared, *settings, *own_rate, *go_on, *constant)
        found[arm] = {"top1": done["top1"], **totals(run_dir)}
    return found


def arm_dir(folder: Path, seed: int, arm: str, args: argparse.Namespace) -> Path:
    """Where an arm runs."""
    return folder / f"seed{seed}" / f"{arm.replace(', qk=', '_')}_{args.rate:g}_{args.arm_epochs}"


def results_of(run_dir: Path, which: str) -> float:
    """Test top-1 of the final weights, from which the arms start."""
    out = run_dir.parent / f"eval_{which}"
    if not (out / "results.json").exists():
        command = [sys.executable, str(ROOT / "eval.py"), f"ckpt={run_dir}/checkpoints/last.ckpt", f"run_dir={out}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((out / "results.json").read_text())["top1"])


def draw(folder: Path, args: argparse.Namespace, path: Path) -> None:
    """The share of oscillating weights over the steps of each arm, a line a seed."""
    figure, axes = plt.subplots(1, len(FIGURE_COLUMNS), figsize=(10, 3.6), constrained_layout=True)
    labels = {"osc/share": "weights that oscillate, %", "osc/band": "weights near a threshold, %"}
    for axis, column in zip(axes, FIGURE_COLUMNS, strict=True):
        for number, arm in enumerate(ARMS):
            for seed in args.seeds:
                steps, values = course(arm_dir(folder, seed, arm, args), column)
                axis.plot(steps, values, color=f"C{number}", lw=1, label=arm if seed == args.seeds[0] else None)
        axis.set(xlabel="step", ylabel=labels[column], ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Run everything that is not there yet, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=sorted(SETS), default="digits")
    parser.add_argument("--root", help="folder of the images")
    parser.add_argument("--epochs", type=int, default=50, help="of the float net, and of the 2-bit net")
    parser.add_argument("--arm-epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-5, help="constant learning rate of the arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/cga"))
    args = parser.parse_args()
    folder = (args.out / args.data).absolute()
    by_seed = [run_seed(folder, seed, args) for seed in args.seeds]
    print(f"{'arm':18}{'top-1':>18}{'oscillating %':>18}{'in band %':>18}{'flips / 1000':>18}")
    for arm in by_seed[0]:
        cells = []
        for key in ("top1", "oscillating", "in_band", "flips"):
            values = [figures[arm][key] for figures in by_seed]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):8.2f} +- {spread:4.2f}")
        print(f"{arm:18}" + "".join(f"{cell:>18}" for cell in cells))
    path = folder / f"oscillation_{args.rate:g}_{args.arm_epochs}.svg"
    draw(folder, args, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
