"""python -m evidence.gpu: speed of training steps; with --train FOLDER, accuracy of quantizers trained on CIFAR-10. docs/gpu.md."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

FOLDER = Path("outputs/gpu")


def arguments() -> argparse.Namespace:
    """What to do."""
    parser = argparse.ArgumentParser(prog="python -m evidence.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"JSON lines; what is there already is not measured again (default below {FOLDER})")
    parser.add_argument("--seconds", type=float, default=540, help="when to end; the same command goes on from there")
    parser.add_argument("--models", nargs="+", help="timm's names; default DeiT-T, -S and -B")
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="with train*.parquet and test*.parquet of CIFAR-10: train instead")
    parser.add_argument("--only", default="*", metavar="GLOB", help="with --train: names of runs")
    parser.add_argument("--processes", type=int, default=6, help="with --train: runs side by side")
    parser.add_argument("--epochs", type=int, default=20, help="with --train: of a quantized run")
    parser.add_argument("--float-epochs", type=int, default=30, help="with --train: of a float run, which others start from")
    parser.add_argument("--summary", action="store_true", help="print the tables of what is in --out and end")
    parser.add_argument("--dry-run", action="store_true", help="walk through all of it on the CPU, with tiny nets, without the compiler")
    args = parser.parse_args()
    args.out = args.out or FOLDER / ("train.jsonl" if args.train else "measured.jsonl")
    if args.dry_run:  # its rows, nets and images are not to be taken for real ones
        args.out = Path(tempfile.mkdtemp()) / args.out.name
    return args


def main() -> None:
    """Measure or train, then print tables."""
    args = arguments()
    # Behind the options: processes that measure import this file too, and what they need alone.
    import torch

    from evidence.gpu import measure, records, report, steps, summary, train

    if args.summary:
        rows = records.read(args.out)
        if not rows:
            raise SystemExit(f"--out {args.out}: must be a file with rows of an earlier command")
        print(report.text({row["name"]: row for row in rows if "name" in row}) if "name" in rows[0] else summary.text(rows))
        return
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("evidence.gpu: there is no CUDA device; --dry-run tries the code on a CPU")
    if args.train:
        print(train.train(args))
        return
    print(measure.measure(args.out, args.seconds, args.models or list(steps.MODELS), dry_run=args.dry_run))


if __name__ == "__main__":
    main()
