"""`python -m evidence run C1`: the runs of a claim that have no record yet. `page`: docs/accuracy.md and evidence/pages/ from all records.

`check`: is it what they give. `quick`: a small claim in a temporary folder, then the page. `one CLAIM/ARM`: a single run, again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

from evidence.claims.run import ROOT, Arms, run_all, run_one
from evidence.pages import page
from qat.errors import UsageError

log = logging.getLogger("qat.evidence")


def main() -> int:
    """Exit code 1 where a run failed or the page is not what its records give."""
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__)
    parser.add_argument("what", choices=("run", "one", "page", "check", "quick"))
    parser.add_argument("names", nargs="*", help="claims or arms: C1, C1/statsq_w2; none = all")
    parser.add_argument(
        "--root", default=os.environ.get("QAT_CIFAR10"), help="folder of CIFAR-10; or $QAT_CIFAR10"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes at a time"
    )
    parser.add_argument("--seed", type=int, default=0, help="of `one`")
    args = parser.parse_intermixed_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    try:
        return int(_do(args))
    except UsageError as error:
        log.error("error: %s", error)
        return 1


def _do(args: argparse.Namespace) -> bool:
    """Whether something is wrong afterwards."""
    if args.what == "check":
        stale = page.check(ROOT)
        log.info("%s", "\n".join(stale) or "nothing is stale")
        return bool(stale)
    if args.what in {"run", "one"}:
        if not (args.root and Path(args.root).is_dir()):
            raise UsageError(
                f"--root={args.root!r}: must be the folder of CIFAR-10 (parquet files, or cifar-10-batches-py)"
            )
        arms, root = Arms(), str(Path(args.root).resolve())
        if args.what == "run":
            return run_all(args.names, root, args.workers, arms) > 0
        for name in args.names:
            run_one(arms[name], args.seed, root, arms)
        return False
    failed = 0
    if args.what == "quick":
        with tempfile.TemporaryDirectory(prefix="qat-evidence-") as folder:
            arms = Arms(
                ROOT / "evidence" / "quick", Path(folder) / "records", Path(folder) / "runs"
            )
            failed = run_all((), None, args.workers, arms)
            log.info(
                "%s", "\n".join(page.pages(page.read_evidence(arms.claims, arms.records)).values())
            )
    page.write(ROOT)
    return failed > 0


if __name__ == "__main__":
    raise SystemExit(main())
