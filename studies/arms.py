"""What is run for an arm of a claim: the commands, made of presets, its own settings and what other arms have left behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qat.errors import UsageError
from studies.checks import Fields
from studies.claims import Claim, load_claims

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("train", "ptq", "analyze", "eval", "peers")
KEYS = ("label", "command", "use", "set", "ckpt", "teacher", "seeds", "further", "best_of", "keep")
FURTHER_KEYS = ("command", "use", "set", "weights")


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
class Arm:
    """One line of a comparison.

    Attributes:
        claim, name: where it is written down.
        command: train | ptq | analyze | eval | peers.
        use: names of presets.
        settings: overrides behind those of the presets.
        ckpt: `CLAIM/arm` or `CLAIM/arm@last`, whose weights it starts from; None = random ones.
        teacher: likewise.
        seeds: numbers of its runs.
        further: commands on the weights of a finished run, by name; their figures are part of its record.
        best_of: arms, `CLAIM/arm`; in a claim's file a name alone is one of its own. The settings of the one with the highest validation
            top-1 come behind `settings`.
        keep: its best weights lie beside its record, where other arms take them from: who runs those needs not run this one.
    """

    claim: str
    name: str
    command: str = "train"
    use: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    ckpt: str | None = None
    teacher: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    further: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    best_of: tuple[str, ...] = ()
    keep: bool = False

    @property
    def path(self) -> str:
        """What other arms call it."""
        return f"{self.claim}/{self.name}"

    def sources(self) -> list[str]:
        """Whose weights it takes, `CLAIM/arm[@last]`."""
        return [one for one in (self.ckpt, self.teacher) if one]

    def needs(self) -> list[str]:
        """Arms that have to be there first."""
        return [one.partition("@")[0] for one in self.sources()] + list(self.best_of)


Run = tuple[Arm, int]


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
        """Read and check them.

        Raises:
            UsageError: a key, a preset or an arm that is named does not exist.
        """
        found = {}
        for claim in load_claims(places.claims).values():
            for name in claim.arms:
                arm = _arm(claim, name)
                found[arm.path] = arm
        for arm in found.values():
            for other in arm.needs():
                if other not in found:
                    raise UsageError(f"{arm.path} needs {other!r}; allowed are arms of {places.claims}")
        return cls(places, found)

    def __getitem__(self, path: str) -> Arm:
        return self.by_path[path]

    def runs(self, wanted: Sequence[str] = (), only_seed: int | None = None) -> Iterator[Run]:
        """Runs of claims or arms, `C1` or `C1/statsq_w2`, each behind those it needs, first seeds first; nothing wanted = all.

        Args:
            wanted: claims or arms.
            only_seed: leaves other seeds out, but for runs that one of this seed needs.

        Raises:
            UsageError: there is no such claim or arm, or it has no such seed.
        """
        claims = sorted({arm.claim for arm in self.by_path.values()})
        seen: set[tuple[str, int]] = set()
        for name in wanted or claims:
            chosen = [arm for arm in self.by_path.values() if name in {arm.claim, arm.path}]
            if not chosen:
                raise UsageError(f"{name!r}: allowed are {', '.join(claims)}, and arms of theirs, CLAIM/ARM")
            seeds = sorted({seed for arm in chosen for seed in arm.seeds})
            if only_seed is not None and only_seed not in seeds:
                raise UsageError(f"--seed={only_seed}: {name} has {', '.join(map(str, seeds))}")
            for seed in seeds if only_seed is None else [only_seed]:
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
        others = [self[path] for path in arm.needs()]
        return [(other, seed if seed in other.seeds else other.seeds[0]) for other in others]

    def run_dir(self, arm: Arm, seed: int) -> Path:
        """Where a run leaves its files."""
        return self.places.runs / arm.claim / f"{arm.name}-seed{seed}"

    def record_path(self, arm: Arm, seed: int) -> Path:
        """Where what is kept of it is written."""
        return self.places.results / arm.claim / f"{arm.name}-seed{seed}.json"

    def kept_path(self, arm: Arm, seed: int) -> Path:
        """Where its weights are kept, if they are."""
        return self.record_path(arm, seed).with_suffix(".pt")

    def is_done(self, arm: Arm, seed: int) -> bool:
        """True if all that the arm asks for is in its record."""
        path = self.record_path(arm, seed)
        if not path.exists() or (arm.keep and not self.kept_path(arm, seed).exists()):
            return False
        return set(arm.further) <= set(json.loads(path.read_text(encoding="utf-8"))["further_commands"])

    def to_do(self, wanted: Sequence[str] = (), only_seed: int | None = None) -> list[Run]:
        """Runs that have no record, and those whose weights one of them needs but which are not here, in the order of `runs`."""
        runs = list(self.runs(wanted, only_seed))
        chosen = {(arm.path, seed) for arm, seed in runs if not self.is_done(arm, seed)}
        for arm, seed in reversed(runs):
            if (arm.path, seed) in chosen:
                chosen |= self._lost(arm, seed)
        return [(arm, seed) for arm, seed in runs if (arm.path, seed) in chosen]

    def _lost(self, arm: Arm, seed: int) -> set[tuple[str, int]]:
        """Runs whose weights it takes and which are not here."""
        lost = {of.partition("@")[0] for of in arm.sources() if not (ROOT / self.checkpoint(of, seed)).exists()}
        return {(other.path, its_seed) for other, its_seed in self.needed(arm, seed) if other.path in lost}

    def checkpoint(self, of: str, seed: int) -> Path:
        """File of `CLAIM/arm[@last]`, of this seed or, where the arm has others, of its first."""
        path, _, which = of.partition("@")
        arm = self[path]
        its_seed = seed if seed in arm.seeds else arm.seeds[0]
        if arm.keep and not which:
            kept = self.kept_path(arm, its_seed)
            return kept.relative_to(ROOT) if kept.is_relative_to(ROOT) else kept
        file = "quantized.ckpt" if arm.command == "ptq" else f"checkpoints/{which or 'best'}.ckpt"
        return self.run_dir(arm, its_seed) / file

    def starts(self, arm: Arm, seed: int) -> dict[str, str]:
        """Digests of the kept weights that it takes: figures made from others are no match for those of its neighbours."""
        paths = {of: ROOT / self.checkpoint(of, seed) for of in arm.sources() if self[of.partition("@")[0]].keep}
        return {of: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for of, path in paths.items() if path.exists()}

    def settings(self, arm: Arm, seed: int) -> list[str]:
        """Overrides of the arm's command, without run_dir and data.root."""
        chosen = [*preset(arm.use), *arm.settings]
        if arm.best_of:
            chosen += self._best(arm).settings
        for key, of in (("ckpt", arm.ckpt), ("teacher.ckpt", arm.teacher)):
            if of is not None:
                chosen.append(f"{key}={self.checkpoint(of, seed)}")
        return [*chosen, f"seed={seed}"]

    def _best(self, arm: Arm) -> Arm:
        """The arm of `best_of` with the highest validation top-1 of its first seed."""

        def score(name: str) -> float:
            other = self[name]
            record = json.loads(self.record_path(other, other.seeds[0]).read_text(encoding="utf-8"))
            found: float = record["metrics"]["val_top1"]
            return found

        return self[max(arm.best_of, key=score)]


def preset(names: Sequence[str]) -> list[str]:
    """Settings of presets, one after the other."""
    presets: dict[str, list[str]] = yaml.safe_load((ROOT / "studies" / "presets.yaml").read_text(encoding="utf-8"))
    for name in names:
        if name not in presets:
            raise UsageError(f"use: {name!r}: allowed are {', '.join(presets)}")
    return [setting for name in names for setting in presets[name]]


def _arm(claim: Claim, name: str) -> Arm:
    entry = claim.arms[name]
    fields = Fields(claim.file, f"arms.{name}", entry, KEYS)
    command = fields.choice("command", COMMANDS) if fields.has("command") else "train"
    for title, further in entry.get("further", {}).items():
        Fields(claim.file, f"arms.{name}.further.{title}", further, FURTHER_KEYS)
    return Arm(
        claim.id,
        name,
        command,
        tuple(entry.get("use", ())),
        tuple(entry.get("set", ())),
        entry.get("ckpt"),
        entry.get("teacher"),
        claim.seeds_of(name),
        entry.get("further", {}),
        tuple("/".join(claim.place(one)) for one in entry.get("best_of", ())),
        bool(entry.get("keep", False)),
    )
