"""Every mistake of tests/campaign: what is printed, and whether it is right; a table on the terminal and in a file.

PYTHONPATH=. python benchmarks/bad_inputs.py --log outputs/bad-inputs.log
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from tests.campaign.bases import bases
from tests.campaign.files import checkpoint_cases, judged, resume_cases
from tests.campaign.judging import thinned, verdict
from tests.campaign.mutations import mutations
from tests.campaign.places import data_cases, path_cases
from tests.campaign.running import attempt, no_steps
from tests.conftest import train

WIDTHS = (56, 20, 8)
Row = tuple[str, str, str, str]


def main() -> int:
    """Try all of them; 1 if one is not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True, help="file that the table goes to")
    parser.add_argument("--every", type=int, default=1, help="of the settings, only one mistake in so many")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        folder = Path(made)
        rows = list(_rows(folder, options.every))
    counts = Counter(row[2] for row in rows)
    wrong = [row for row in rows if row[2].startswith("WRONG")]
    lines = [f"{'case':{WIDTHS[0]}} {'command':{WIDTHS[1]}} {'ok':{WIDTHS[2]}} message", *map(_line, rows)]
    lines += ["", f"{len(rows)} cases: " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))]
    text = "\n".join(lines).replace(made, "DIR") + "\n"
    sys.stdout.write(text)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    options.log.write_text(text, encoding="utf-8")
    return 1 if wrong else 0


def _line(row: Row) -> str:
    case, command, right, message = row
    return f"{case:{WIDTHS[0]}} {command:{WIDTHS[1]}} {right:{WIDTHS[2]}} {message[:300]}"


def _rows(folder: Path, every: int) -> Iterator[Row]:
    best = train(folder / "float", "quant=fp") / "checkpoints" / "best.ckpt"
    tracked = train(folder / "tracked", "quant=ofq_4bit", "callbacks=[default,oscillation]", f"ckpt={best}")
    last = tracked / "checkpoints" / "last.ckpt"
    with no_steps():
        for base in bases(best, last):
            for mutation in thinned([one for group in base.groups for one in mutations(base.cfg, group)], every):
                cfg = mutation.applied(base.cfg)
                OmegaConf.update(cfg, "run_dir", str(folder / "run"))
                outcome = attempt(base.task, cfg)
                yield f"{mutation}", base.name, _word(outcome.kind, verdict(base, mutation, outcome)), outcome.message
        files = [checkpoint_cases(folder, best, last), resume_cases(folder, tracked), path_cases(folder, last), data_cases(folder)]
        for case in (case for cases in files for case in cases):
            outcome = attempt(case.task, case.cfg)
            yield case.name, case.command, _word(outcome.kind, judged(case, outcome, folder)), outcome.message


def _word(kind: str, problem: str) -> str:
    return f"WRONG ({problem})" if problem else "ok" if kind == "refused" else "allowed"


if __name__ == "__main__":
    sys.exit(main())
