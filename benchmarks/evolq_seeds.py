"""What the search over scales adds to calibration: bits, fitness functions and methods at an equal number of forward passes, over seeds.

Run by `make evolq-seeds`. Selection is by the fitness on calibration images; test accuracy is read once, at the end of each run. That the
fitness of what a search keeps never rises is checked in each run's `search.csv`.
"""

from __future__ import annotations

import argparse
import csv
import logging
from pathlib import Path

from in_process import cell, run

STEP = ("search.radius=0.1", "search.relative=true")
ARMS = {
    **{f"W{bits}A8 calibrated": (f"ptq=evolq_w{bits}a8", "~search") for bits in (8, 4, 3)},
    **{f"W{bits}A8 infonce": (f"ptq=evolq_w{bits}a8",) for bits in (8, 4, 3)},
    **{f"W3A8 {kind}": ("ptq=evolq_w3a8", f"search.fitness={kind}") for kind in ("mse", "kl", "cosine")},
    **{f"W3A8 {method}": ("ptq=evolq_w3a8", f"search={method}") for method in ("random", "adam", "sgd")},
    # Noise of a tenth of each scale, the best found for methods without gradients at 3 bits.
    **{f"W3A8 {method} 0.1": ("ptq=evolq_w3a8", f"search={method}", *STEP) for method in ("evolution", "random")},
    "W3A8 omse": ("ptq=omse_w3a8",),
    "W3A8 omse infonce": ("ptq=omse_w3a8", "search=evolution"),
}


def check_falling(run_dir: Path) -> None:
    """Stop if the fitness that a search kept ever rose."""
    with (run_dir / "search.csv").open() as file:
        kept = [float(line["fitness"]) for line in csv.DictReader(file) if line["accepted"] == "1"]
    if kept != sorted(kept, reverse=True):
        raise SystemExit(f"{run_dir}: the fitness rose: {kept}")


def main() -> None:
    """Run what is not there yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=50, help="of the float nets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/evolq"))
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--images", type=int, default=1000, help="for calibration and search")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    found: dict[str, list[dict]] = {arm: [] for arm in args.arms}
    for seed in args.seeds:
        folder = args.out.absolute() / f"seed{seed}"
        training = (f"trainer.max_epochs={args.epochs}", "optimizer.lr=3e-3", "scheduler.warmup_epochs=2")
        run("train", folder / "fp", f"seed={seed}", "quant=fp", *training)
        for arm in args.arms:
            start = (f"seed={seed}", f"ckpt={folder}/fp/checkpoints/best.ckpt", f"data.calibration_images={args.images}")
            searches = "~search" not in ARMS[arm] and arm != "W3A8 omse"
            passes = (f"search.passes={args.passes}",) if searches else ()
            run_dir = folder / f"{arm.replace(' ', '_')}_{args.passes}"
            found[arm].append(run("ptq", run_dir, *start, *ARMS[arm], *passes))
            if searches:
                check_falling(run_dir)
    print(f"{'':22}{'top-1':>18}{'float top-1':>18}{'fitness before':>24}{'fitness':>24}{'seconds':>18}")
    for arm, results in found.items():
        row = [cell([r["top1"] for r in results], ".2f"), cell([r["top1_fp"] for r in results], ".2f")]
        searches = [r["search"] for r in results if r.get("search")]
        row += [cell([s[key] for s in searches], ".5f") if searches else "" for key in ("fitness_before", "fitness")]
        row.append(cell([r["wall_seconds"] for r in results], ".1f"))
        print(f"{arm:22}" + "".join(f"{value:>{width}}" for value, width in zip(row, (18, 18, 24, 24, 18), strict=True)))


if __name__ == "__main__":
    main()
