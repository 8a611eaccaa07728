"""python -m evidence.gpu: speed of training steps; with --train, accuracy on CIFAR-10.

See evidence/gpu/README.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

FOLDER = Path("outputs/gpu")


def main() -> None:
    """Measure or train, then print tables."""
    parser = argparse.ArgumentParser(prog="python -m evidence.gpu", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        help=f"JSON lines; existing rows are not measured again (default below {FOLDER})",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=540,
        help="time after which to end; the same command then continues",
    )
    parser.add_argument("--models", nargs="+", help="timm models; default DeiT-T, -S and -B")
    parser.add_argument(
        "--train",
        type=Path,
        metavar="FOLDER",
        help="train instead, on train*.parquet and test*.parquet of CIFAR-10 in this folder",
    )
    parser.add_argument("--only", default="*", metavar="GLOB", help="with --train: which runs")
    parser.add_argument("--epochs", type=int, default=20, help="of each quantized run")
    parser.add_argument(
        "--float-epochs",
        type=int,
        default=30,
        help="of each float run, from which quantized runs start",
    )
    parser.add_argument(
        "--summary", action="store_true", help="only print the tables of the rows in --out"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="try all steps on the CPU, with tiny nets, without the compiler",
    )
    args = parser.parse_args()
    # Several processes share the cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    # These imports are here because worker processes also import this file, and need less.
    import torch

    from evidence.gpu import speed, train
    from evidence.gpu.rows import read

    args.out = args.out or FOLDER / ("train.jsonl" if args.train else "measured.jsonl")
    if args.dry_run:
        # Rows, models and images of a dry run must not be mistaken for real results.
        args.out = Path(tempfile.mkdtemp()) / args.out.name
    if args.summary:
        rows = read(args.out)
        if not rows:
            raise SystemExit(f"--out {args.out}: must be a file with rows of an earlier command")
        print(speed.report(rows) if "name" in rows[0] else train.report(rows))
        return
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("evidence.gpu: needs a CUDA device; --dry-run tries the code on a CPU")
    print(train.command(args) if args.train else speed.command(args))


if __name__ == "__main__":
    main()
