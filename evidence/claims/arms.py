"""The arms of all claims (the variants that they compare): order, files and settings of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from evidence.claims.claim import Arm, load_claims
from evidence.claims.records import read_records
from qat.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
# An arm and a seed.
Run = tuple[Arm, int]


@dataclass(frozen=True)
class Arms:
    """All arms of the claims in a folder, and the folders of their runs.

    Attributes:
        claims: folder of claim files.
        records: folder of records.
        runs: folder of the files of runs; it is relative to the repository, because commands in
            records contain it.
    """

    claims: Path = ROOT / "evidence" / "claims"
    records: Path = ROOT / "evidence" / "records"
    runs: Path = Path("outputs/evidence")
    by_path: dict[str, Arm] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for claim in load_claims(self.claims).values():
            for arm in claim.arms.values():
                self.by_path[arm.path] = arm
        for arm in self.by_path.values():
            for other in arm.needs():
                if other not in self.by_path:
                    raise UsageError(
                        f"{arm.path} needs {other!r}: must be one of the arms of {self.claims}"
                    )

    def __getitem__(self, path: str) -> Arm:
        if path not in self.by_path:
            raise UsageError(f"{path!r}: must be CLAIM/ARM of a file in evidence/claims")
        return self.by_path[path]

    def ordered(self, names: Sequence[str] = ()) -> list[Run]:
        """Runs of claims or arms, each after the runs that it needs, ordered by seed.

        Args:
            names: claims (`C1`) or arms (`C1/statsq_w2`); empty = all.

        Raises:
            UsageError: there is no such claim or arm.
        """
        claims = sorted({arm.claim for arm in self.by_path.values()})
        runs: dict[tuple[str, int], Run] = {}

        def add(arm: Arm, seed: int) -> None:
            for needed_arm, needed_seed in self.needed(arm, seed):
                add(needed_arm, needed_seed)
            runs.setdefault((arm.path, seed), (arm, seed))

        for name in names or claims:
            pairs = []
            for arm in self.by_path.values():
                if name in {arm.claim, arm.path}:
                    pairs += [(seed, arm) for seed in arm.seeds]
            if not pairs:
                raise UsageError(
                    f"{name!r}: must be one of {', '.join(claims)}, or one of their arms, CLAIM/ARM"
                )
            for seed, arm in sorted(pairs, key=lambda pair: pair[0]):
                add(arm, seed)
        return list(runs.values())

    def needed(self, arm: Arm, seed: int) -> list[Run]:
        """Runs that must finish first, with the same seed or else the first seed of their arm."""
        runs = []
        for path in arm.needs():
            source = self[path]
            runs.append((source, _seed_of(source, seed)))
        return runs

    def run_dir(self, arm: Arm, seed: int) -> Path:
        """Folder of a run."""
        return self.runs / arm.claim / f"{arm.name}-seed{seed}"

    def weights_file(self, arm: Arm, seed: int) -> Path:
        """File that stores a run's weights for other runs."""
        path = self.records.parent / "weights" / arm.claim / f"{arm.name}-seed{seed}.pt"
        return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path

    def to_do(self, names: Sequence[str] = ()) -> list[Run]:
        """Unfinished runs, and runs whose missing weights they need.

        A run is finished if its record has all its commands and its stored weights exist. Retired
        arms count as finished.

        Args:
            names: see `ordered`; the runs are in the same order.
        """
        records = {}
        for record in read_records(self.records):
            records[f"{record.claim}/{record.arm}", record.seed] = record

        def is_finished(arm: Arm, seed: int) -> bool:
            if arm.keep and not (ROOT / self.weights_file(arm, seed)).exists():
                return False
            record = records.get((arm.path, seed))
            return record is not None and set(arm.further) <= set(record.further_commands)

        runs = self.ordered(names)
        selected = set()
        for arm, seed in runs:
            if not arm.retired and not is_finished(arm, seed):
                selected.add((arm.path, seed))
        for arm, seed in reversed(runs):
            if (arm.path, seed) not in selected:
                continue
            for source in arm.sources():
                if not (ROOT / self.checkpoint(source, seed)).exists():
                    path = source.partition("@")[0]
                    selected.add((path, _seed_of(self[path], seed)))
        return [(arm, seed) for arm, seed in runs if (arm.path, seed) in selected]

    def checkpoint(self, source: str, seed: int) -> Path:
        """Checkpoint of `CLAIM/arm[@last]`, with the given seed or else the arm's first seed."""
        path, _, which = source.partition("@")
        arm = self[path]
        arm_seed = _seed_of(arm, seed)
        if arm.keep and not which:
            return self.weights_file(arm, arm_seed)
        folder = self.run_dir(arm, arm_seed)
        if arm.command == "ptq":
            return folder / "quantized.ckpt"
        return folder / "checkpoints" / f"{which or 'best'}.ckpt"

    def settings(self, arm: Arm, seed: int) -> list[str]:
        """Overrides of the arm's command, without `run_dir` and `data.root`."""
        overrides = preset(arm.use)
        if arm.best_of:
            overrides += self[self._best(arm.best_of)].set
        overrides += arm.set  # last, because they override those of the choice
        sources = {"ckpt": arm.ckpt, "teacher.ckpt": arm.teacher}
        for key, source in sources.items():
            if source:
                overrides.append(f"{key}={self.checkpoint(source, seed)}")
        return [*overrides, f"seed={seed}"]

    def _best(self, paths: Sequence[str]) -> str:
        """The arm with the highest validation top-1 of its first seed."""
        scores = {}
        for record in reversed(read_records(self.records)):
            scores[f"{record.claim}/{record.arm}"] = record.metrics.get("val_top1")
        for path in paths:
            if scores.get(path) is None:
                raise UsageError(
                    f"{path}: must have a record with val_top1, which another arm's choice needs"
                )
        return max(paths, key=lambda path: scores[path])


def _seed_of(arm: Arm, seed: int) -> int:
    return seed if seed in arm.seeds else arm.seeds[0]


def preset(names: Sequence[str]) -> list[str]:
    """Concatenated settings of presets."""
    path = ROOT / "evidence" / "claims" / "_presets.yaml"
    presets: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = []
    for name in names:
        settings += presets[name]
    return settings
