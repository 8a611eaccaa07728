"""What is run for an arm of a claim: the commands, made of presets, its own settings and what other arms have left behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from qat.errors import UsageError
from studies.claims import Arm, load_claims

ROOT = Path(__file__).resolve().parents[1]
Run = tuple[Arm, int]


@dataclass(frozen=True)
class Places:
    """Folders of a study.

    Attributes:
        claims: of claim files.
        results: where records are written, a folder for each claim.
        runs: where runs leave their files; relative to the repository, as it stands in the commands of records.
    """

    claims: Path = ROOT / "studies" / "claims"
    results: Path = ROOT / "results"
    runs: Path = Path("outputs/studies")


@dataclass(frozen=True)
class Arms:
    """All arms of the claims in a folder.

    Attributes:
        by_path: `CLAIM/arm`.
    """

    places: Places
    by_path: Mapping[str, Arm]

    @classmethod
    def read(cls, places: Places) -> Arms:
        """Read them.

        Raises:
            UsageError: a key, or an arm that is named, does not exist.
        """
        found = {arm.path: arm for claim in load_claims(places.claims).values() for arm in claim.arms.values()}
        for arm in found.values():
            for other in arm.needs():
                if other not in found:
                    raise UsageError(f"{arm.path} needs {other!r}: must be one of the arms of {places.claims}")
        return cls(places, found)

    def __getitem__(self, path: str) -> Arm:
        return self.by_path[path]

    def runs(self, wanted: Sequence[str] = ()) -> Iterator[Run]:
        """Runs of claims or arms, `C1` or `C1/statsq_w2`, each behind those it needs, first seeds first; nothing wanted = all.

        Raises:
            UsageError: there is no such claim or arm.
        """
        claims = sorted({arm.claim for arm in self.by_path.values()})
        seen: set[tuple[str, int]] = set()
        for name in wanted or claims:
            chosen = [arm for arm in self.by_path.values() if name in {arm.claim, arm.path}]
            if not chosen:
                raise UsageError(f"{name!r}: must be one of {', '.join(claims)}, or an arm of theirs, CLAIM/ARM")
            for seed in sorted({seed for arm in chosen for seed in arm.seeds}):
                for arm in chosen:
                    if seed in arm.seeds:
                        yield from self._behind_its_needs(arm, seed, seen)

    def _behind_its_needs(self, arm: Arm, seed: int, seen: set[tuple[str, int]]) -> Iterator[Run]:
        for other, its_seed in self.needed(arm, seed):
            yield from self._behind_its_needs(other, its_seed, seen)
        if (arm.path, seed) not in seen:
            seen.add((arm.path, seed))
            yield arm, seed

    def needed(self, arm: Arm, seed: int) -> list[Run]:
        """Runs that have to be done first; of an arm with other seeds its first."""
        return [(self[path], _seed_of(self[path], seed)) for path in arm.needs()]

    def run_dir(self, arm: Arm, seed: int) -> Path:
        """Where a run leaves its files."""
        return self.places.runs / arm.claim / f"{arm.name}-seed{seed}"

    def record_path(self, arm: Arm, seed: int) -> Path:
        """Where what is kept of it is written; its weights, if they are kept, are beside it as `.pt`."""
        return self.places.results / arm.claim / f"{arm.name}-seed{seed}.json"

    def is_done(self, arm: Arm, seed: int) -> bool:
        """True if all that the arm asks for is in its record."""
        path = self.record_path(arm, seed)
        if not path.exists() or (arm.keep and not path.with_suffix(".pt").exists()):
            return False
        return set(arm.further) <= set(json.loads(path.read_text(encoding="utf-8"))["further_commands"])

    def to_do(self, wanted: Sequence[str] = ()) -> list[Run]:
        """Runs that have no record, and those whose weights one of them needs but which are not here, in the order of `runs`."""
        runs = list(self.runs(wanted))
        chosen = {(arm.path, seed) for arm, seed in runs if not self.is_done(arm, seed)}
        for arm, seed in reversed(runs):
            if (arm.path, seed) in chosen:
                lost = [of.partition("@")[0] for of in arm.sources() if not (ROOT / self.checkpoint(of, seed)).exists()]
                chosen |= {(path, _seed_of(self[path], seed)) for path in lost}
        return [(arm, seed) for arm, seed in runs if (arm.path, seed) in chosen]

    def checkpoint(self, of: str, seed: int) -> Path:
        """File of `CLAIM/arm[@last]`, of this seed or, where the arm has others, of its first."""
        path, _, which = of.partition("@")
        arm, its_seed = self[path], _seed_of(self[path], seed)
        if arm.keep and not which:
            kept = self.record_path(arm, its_seed).with_suffix(".pt")
            return kept.relative_to(ROOT) if kept.is_relative_to(ROOT) else kept
        file = "quantized.ckpt" if arm.command == "ptq" else f"checkpoints/{which or 'best'}.ckpt"
        return self.run_dir(arm, its_seed) / file

    def starts(self, arm: Arm, seed: int) -> dict[str, str]:
        """Digests of the kept weights that it takes: figures made from others are no match for those of its neighbours."""
        paths = {of: ROOT / self.checkpoint(of, seed) for of in arm.sources() if self[of.partition("@")[0]].keep}
        return {of: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for of, path in paths.items() if path.exists()}

    def settings(self, arm: Arm, seed: int) -> list[str]:
        """Overrides of the arm's command, without run_dir and data.root."""
        chosen = [*preset(arm.use), *arm.set, *(self[max(arm.best_of, key=self._val_top1)].set if arm.best_of else ())]
        sources = {"ckpt": arm.ckpt, "teacher.ckpt": arm.teacher}
        return [*chosen, *(f"{key}={self.checkpoint(of, seed)}" for key, of in sources.items() if of), f"seed={seed}"]

    def _val_top1(self, path: str) -> float:
        """Of the first seed of an arm, as its record says."""
        record = self.record_path(self[path], self[path].seeds[0])
        return float(json.loads(record.read_text(encoding="utf-8"))["metrics"]["val_top1"])


def _seed_of(arm: Arm, seed: int) -> int:
    return seed if seed in arm.seeds else arm.seeds[0]


def preset(names: Sequence[str]) -> list[str]:
    """Settings of presets, one after the other."""
    presets: dict[str, list[str]] = yaml.safe_load((ROOT / "studies" / "presets.yaml").read_text(encoding="utf-8"))
    for name in names:
        if name not in presets:
            raise UsageError(f"use={name!r}: must be one of {', '.join(presets)}")
    return [setting for name in names for setting in presets[name]]
