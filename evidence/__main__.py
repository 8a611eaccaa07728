"""`python -m evidence COMMAND`: run claims, write their pages, check the pages.

- `run C1`: execute the runs of a claim that have no record yet.
- `one CLAIM/ARM`: write the record of a single run again; without its files, repeat the run.
- `page`: write docs/accuracy.md and evidence/pages/ from all records.
- `check`: list the pages that differ from the records.
- `quick`: run a small claim in a temporary folder, then write the pages.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

from evidence.claims.arms import ROOT, Arms
from evidence.claims.run import run_all, run_one
from evidence.pages import page
from evidence.pages.evidence import read_evidence
from qat.errors import UsageError

log = logging.getLogger("qat.evidence")


def main() -> int:
    """Return the exit code: 1 if a run failed or `check` found differences, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("run", "one", "page", "check", "quick"))
    parser.add_argument(
        "names", nargs="*", help="run: claims or arms (C1, C1/statsq_w2), none = all; one: arms"
    )
    parser.add_argument(
        "--root", default=os.environ.get("QAT_CIFAR10"), help="folder of CIFAR-10 [$QAT_CIFAR10]"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of processes at a time"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the run that `one` repeats")
    args = parser.parse_intermixed_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    try:
        return int(_run_command(args))
    except UsageError as error:
        log.error("error: %s", error)
        return 1


def _run_command(args: argparse.Namespace) -> bool:
    """Run the command; return True if a run failed or a page differs."""
    if args.what == "check":
        stale = page.check(ROOT)
        log.info("%s", "\n".join(stale) or "nothing is stale")
        return bool(stale)
    if args.what == "run":
        return run_all(args.names, _cifar10(args), args.workers, Arms()) > 0
    if args.what == "one":
        root = _cifar10(args)
        arms = Arms()
        for name in args.names:
            run_one(arms[name], args.seed, root, arms)
        return False
    num_failed = _run_quick(args.workers) if args.what == "quick" else 0
    page.write(ROOT)
    return num_failed > 0


def _cifar10(args: argparse.Namespace) -> str:
    if not (args.root and Path(args.root).is_dir()):
        raise UsageError(
            f"--root={args.root!r}: must be the folder of CIFAR-10 "
            "(parquet files, or cifar-10-batches-py)"
        )
    return str(Path(args.root).resolve())


def _run_quick(workers: int) -> int:
    """Run a small claim and print its page; return the number of failed runs."""
    with tempfile.TemporaryDirectory(prefix="qat-evidence-") as folder:
        arms = Arms(ROOT / "evidence" / "quick", Path(folder) / "records", Path(folder) / "runs")
        num_failed = run_all((), None, workers, arms)
        pages = page.pages(read_evidence(arms.claims, arms.records))
        log.info("%s", "\n".join(pages.values()))
    return num_failed


if __name__ == "__main__":
    raise SystemExit(main())
