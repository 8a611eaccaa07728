"""`python -m studies run C1`: the runs of a claim that have no record yet. `page`: docs/results.md from all records.

`check`: is it what they give. `quick`: a small study in a temporary folder, then the page. `one`: a single run, in this process.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

from qat.errors import UsageError
from studies import page
from studies.arms import ROOT, Arms, Places
from studies.run import outdated, run_all, run_one

log = logging.getLogger("qat.studies")


def main() -> int:
    """Exit code 1 where a run failed or the page is not what its records give."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("what", choices=("run", "one", "page", "check", "quick"))
    parser.add_argument("names", nargs="*", help="claims or arms: C1, C1/statsq_w2; none = all")
    parser.add_argument("--root", default=os.environ.get("QAT_CIFAR10"), help="folder of CIFAR-10")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seed", type=int, default=0, help="of `one`")
    for name in ("claims", "results", "runs"):
        parser.add_argument(f"--{name}", type=Path, default=getattr(Places(), name), help="folder, if it is not the repository's own")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        return int(_do(args))
    except UsageError as error:
        log.error("error: %s", error)
        return 1


def _do(args: argparse.Namespace) -> bool:
    """Whether something is wrong afterwards."""
    places = Places(args.claims, args.results, args.runs)
    if args.what == "run":
        return run_all(args.names, _root(args), args.workers, places) > 0
    if args.what == "one":
        run_one(args.names[0], args.seed, _root(args), places)
        return False
    if args.what == "check":
        stale = [*page.check(ROOT), *outdated(Arms.read(places))]
        log.info("%s", "\n".join(stale) or "nothing is stale")
        return bool(stale)
    failed = _quick(args.workers) if args.what == "quick" else 0
    page.write(ROOT)
    return failed > 0


def _quick(workers: int) -> int:
    """Run the study on digits in a folder that is gone afterwards, and show its page; gives how many runs failed."""
    with tempfile.TemporaryDirectory(prefix="qat-study-") as folder:
        places = Places(ROOT / "studies" / "small", Path(folder) / "results", Path(folder) / "runs")
        failed = run_all((), None, workers, places)
        log.info("%s", page.render(page.read_evidence(places.claims, places.results)))
    return failed


def _root(args: argparse.Namespace) -> str | None:
    if args.claims != Places().claims and not args.root:
        return None
    if not args.root or not Path(args.root).is_dir():
        raise UsageError(f"--root={args.root!r}: must be the folder of CIFAR-10 (parquet files, or cifar-10-batches-py); or $QAT_CIFAR10")
    return str(Path(args.root).resolve())


if __name__ == "__main__":
    raise SystemExit(main())
