"""Which candidates of a search would a race give up, how many of them wrongly, and how many images would it save?

    python benchmarks/racing_rule.py --out outputs/racing ckpt=FLOAT_CKPT ptq=evolq_w4a8 search.passes=12

runs `ptq.py` with those settings and an exact search that keeps the loss of every image of every candidate, then holds races over what it
kept: after every ten images, from the tenth or the twentieth on, for several numbers of standard errors. With fewer images than the search
has, the images are cut into parts, and a candidate is better in a part when its mean loss there is lower. Without settings the files in
`--out` are read.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qat.ptq import drivers, fitness

ROOT = Path(__file__).resolve().parents[1]
STEP = 10
IMAGES = (100, 1000)
AFTER = (10, 20)
ERRORS = (1.75, 2.0, 2.25, 2.5, 3.0)


@dataclass(frozen=True)
class Candidate:
    """Differences (N,) of its losses to those of the scales that the visit began with, and whether it became the incumbent."""

    worse: Tensor
    accepted: bool


def watched(settings: list[str]) -> list[Candidate]:
    """All candidates of the search of a `ptq.py` run."""
    found: list[Candidate] = []
    look, judge = fitness.Evaluator.fitness, drivers.Visit.evaluate
    rows: list[Tensor] = []

    def fitness_of(self: fitness.Evaluator, block: str, incumbent: Tensor | None = None) -> fitness.Evaluation:
        evaluation = look(self, block)
        rows[:] = [evaluation.rows]
        return evaluation

    def evaluate(self: drivers.Visit, scales: Tensor, cycle: int) -> float:
        value = judge(self, scales, cycle)
        found.append(Candidate(rows[0] - self.start_rows, self.trials[-1].accepted))
        return value

    fitness.Evaluator.fitness, drivers.Visit.evaluate = fitness_of, evaluate  # type: ignore[method-assign]
    sys.argv = ["ptq.py", "search.racing=1", *settings]
    try:
        runpy.run_path(str(ROOT / "ptq.py"), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    return found


def lost_at(worse: Tensor, after: int, errors: float) -> int:
    """Images seen when the race is lost; all of them if it is not."""
    total = len(worse)
    n = torch.arange(after, total, STEP)
    mean = worse.cumsum(0)[n - 1] / n
    variance = (worse.square().cumsum(0)[n - 1] / n - mean.square()).clamp(min=0) * n / (n - 1)
    lost = (mean > errors * (variance * (1 / n - 1 / total)).sqrt()).nonzero()
    return int(n[lost[0]]) if len(lost) else total


def table(candidates: list[Candidate], images: int, after: int) -> None:
    """A line for each number of standard errors."""
    for errors in ERRORS:
        races, given_up, wrongly, seen = 0, 0, 0, 0
        for candidate in candidates:
            for part in candidate.worse.split(images):
                better = candidate.accepted if images >= len(candidate.worse) else bool(part.mean() < 0)
                stop = lost_at(part, after, errors)
                races, seen = races + 1, seen + stop / len(part)
                given_up, wrongly = given_up + (stop < len(part)), wrongly + (better and stop < len(part))
        shares = f"given up {given_up / races:6.1%}, of them wrongly {wrongly / max(given_up, 1):6.2%}, images {seen / races:.3f}"
        print(f"{images:5d} images, from {after:3d} on, {errors:.2f} standard errors: {shares}")


def main() -> None:
    """Search where settings are given, then hold the races."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/racing"))
    args, settings = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if settings:
        kept = [(candidate.worse, candidate.accepted) for candidate in watched(settings)]
        torch.save(kept, args.out / f"{len(list(args.out.glob('*.pt')))}.pt")
    files = sorted(args.out.glob("*.pt"))
    candidates = [Candidate(*entry) for file in files for entry in torch.load(file, weights_only=True)]
    print(f"{len(candidates)} candidates of {len(files)} searches, {sum(c.accepted for c in candidates)} accepted")
    for images in IMAGES:
        for after in AFTER:
            table(candidates, images, after)


if __name__ == "__main__":
    main()
