"""What the files in `studies/claims/` hold: a claim, the runs it needs, what is expected of them and how they are shown."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qat.errors import UsageError

COMMANDS = ("train", "ptq", "analyze", "eval", "peers")
DIRECTIONS = ("higher", "lower", "within", "near")
KINDS = ("lines", "scatter", "curves", "map")
CLAIM = re.compile(r"C(\d+)")
Kind = TypeVar("Kind")
FIRST, LAST = ("START", "AIM"), ("PEERS", "TUNE")


@dataclass(frozen=True)
class Further:
    """A command on the weights of a finished run, `best` or `last`; its figures are part of the run's record."""

    command: str
    use: Sequence[str] = ()
    set: Sequence[str] = ()
    weights: str = "best"


@dataclass(frozen=True)
class Arm:
    """One line of a comparison.

    Attributes:
        claim, name: where it is written down.
        label: what the page calls it.
        command: one of `COMMANDS`.
        use: names of presets.
        set: overrides behind those of the presets.
        ckpt: `CLAIM/arm` or `CLAIM/arm@last`, whose weights it starts from; None = random ones.
        teacher: whose weights its teacher has, as in `ckpt`.
        seeds: numbers of its runs.
        further: commands on its weights, by name.
        best_of: arms, `CLAIM/arm`; in a claim's file a name alone is one of its own. The settings of the one with the highest validation
            top-1 come behind `set`.
        keep: its best weights lie beside its record, where other arms take them from: who runs those needs not run this one.
    """

    claim: str
    name: str
    label: str
    command: str = "train"
    use: Sequence[str] = ()
    set: Sequence[str] = ()
    ckpt: str | None = None
    teacher: str | None = None
    seeds: Sequence[int] = (0, 1, 2)
    further: Mapping[str, Further] = field(default_factory=dict)
    best_of: Sequence[str] = ()
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


@dataclass(frozen=True)
class Expectation:
    """What one metric of an arm should be beside that of another.

    Attributes:
        what: its name on the page.
        metric: of both arms.
        arm: of this claim, or `CLAIM/arm`.
        than: the other arm, or a number.
        direction: `is` in the file, one of `DIRECTIONS`; `within`: not below `than` by more than the margin, `near`: not further from it.
        margin: `by` in the file, in the unit of the metric.
        format: of the difference on the page.
        aim: the README says whether it was reached.
    """

    what: str
    metric: str
    arm: str
    than: str | float
    direction: str
    margin: float = 0.0
    format: str = ".2f"
    aim: bool = False


@dataclass(frozen=True)
class Table:
    """A row an arm, a column a metric: `{metric: heading}`, `{metric: format}`; `{arm: text}` where the label of an arm would not do."""

    rows: Sequence[str]
    columns: Mapping[str, str]
    formats: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        file: its name in `docs/figures/`.
        kind: one of `KINDS`.
        series: of lines `{name: {x: arm}}`, of a scatter `{name: {what a point is called: arm}}`, of the others `{name: arm}`.
        metric: of lines and of a scatter, and of the references.
        along: of a scatter: the metric of its horizontal axis, which is logarithmic.
        curve: name of the curve or the map, of the other kinds.
        x, y: labels of the axes; z: of a map, what its heights are.
        reference: `{name: arm}`, drawn as lines across, not in maps.
        caption: below it.
    """

    file: str
    kind: str
    series: Mapping[str, Any]
    metric: str = "top1"
    along: str = ""
    curve: str = ""
    x: str = ""
    y: str = ""
    z: str = ""
    reference: Mapping[str, str] = field(default_factory=dict)
    caption: str = ""

    @property
    def arms(self) -> tuple[str, ...]:
        """All that it shows, references last."""
        named = self.series.values()
        shown = [arm for points in named for arm in points.values()] if self.kind in {"lines", "scatter"} else list(named)
        return (*shown, *self.reference.values())


@dataclass(frozen=True)
class Claim:
    """One file; `why` is its text on the page, `readme` that in the README."""

    file: Path
    id: str
    title: str
    source: str
    statement: str
    arms: Mapping[str, Arm] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    expect: Sequence[Expectation] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    why: str = ""
    readme: str = ""

    def place(self, arm: str) -> tuple[str, str]:
        """Claim and name of an arm as this claim calls it: `arm` or `CLAIM/arm`."""
        claim, slash, name = arm.rpartition("/")
        return (claim if slash else self.id), name


def load_claims(folder: Path) -> dict[str, Claim]:
    """All claims by id, in the order of the page: START, AIM, C1 to the last C, PEERS, TUNE, further ones by id.

    Raises:
        UsageError: one line that names file, key and what it must be.
    """
    claims = {claim.id: claim for claim in sorted(map(load_claim, sorted(folder.glob("*.yaml"))), key=_order)}
    if not claims:
        raise UsageError(f"claims={folder}: must be a folder with claims")
    return claims


def _order(claim: Claim) -> tuple[int, int, str]:
    if claim.id in FIRST:
        return 0, FIRST.index(claim.id), ""
    if number := CLAIM.fullmatch(claim.id):
        return 1, int(number[1]), ""
    return (2, LAST.index(claim.id), "") if claim.id in LAST else (3, 0, claim.id)


def load_claim(path: Path) -> Claim:
    """One file; arms of other claims are not looked for.

    Raises:
        UsageError: one line that names file, key and what it must be.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: must be YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: must be a mapping")
    content = {key: value.strip() if isinstance(value, str) else value for key, value in content.items()}
    id, seeds = content.get("id", ""), content.get("seeds", (0, 1, 2))
    read = {
        "arms": {name: _arm(id, name, seeds, entry, f"{path}: arms.{name}") for name, entry in content.get("arms", {}).items()},
        "expect": [_expectation(entry, place) for entry, place in _entries(content, "expect", path)],
        "tables": [mapped(Table, entry, place) for entry, place in _entries(content, "tables", path)],
        "figures": [_checked(mapped(Figure, entry, place), "kind", KINDS, place) for entry, place in _entries(content, "figures", path)],
    }
    return mapped(Claim, content | read, f"{path}: content", file=path)


def mapped(kind: type[Kind], content: object, place: str, **known: Any) -> Kind:
    """A dataclass of what was read.

    Args:
        kind: the dataclass.
        content: what was read, a mapping.
        place: file and key, for errors.
        known: fields that are not in the file.

    Raises:
        UsageError: it is no mapping, lacks a field, or has one that there is not.
    """
    fields = [one for one in dataclasses.fields(kind) if one.name not in known]
    names = ", ".join(one.name for one in fields)
    if not isinstance(content, Mapping) or set(content) - {one.name for one in fields}:
        wrong = sorted(map(str, set(content) - {one.name for one in fields})) if isinstance(content, Mapping) else repr(content)
        raise UsageError(f"{place}={wrong}: must be a mapping with {names}")
    for one in fields:
        if one.name not in content and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise UsageError(f"{place}.{one.name}: is missing")
    return kind(**known, **content)


def _entries(content: Mapping[str, Any], name: str, path: Path) -> Iterator[tuple[Any, str]]:
    return ((entry, f"{path}: {name}[{number}]") for number, entry in enumerate(content.get(name, ())))


def _checked(found: Kind, name: str, allowed: Sequence[str], place: str) -> Kind:
    value = getattr(found, name)
    if value not in allowed:
        raise UsageError(f"{place}.{name}={value!r}: must be one of {', '.join(allowed)}")
    return found


def _arm(claim: str, name: str, seeds: Sequence[int], entry: Any, place: str) -> Arm:
    arm = _checked(mapped(Arm, entry, place, claim=claim, name=name), "command", COMMANDS, place)
    further = {title: mapped(Further, one, f"{place}.further.{title}") for title, one in arm.further.items()}
    best_of = [one if "/" in one else f"{claim}/{one}" for one in arm.best_of]
    return dataclasses.replace(arm, seeds=entry.get("seeds", seeds), further=further, best_of=best_of)


def _expectation(entry: Any, place: str) -> Expectation:
    renamed = {{"is": "direction", "by": "margin"}.get(key, key): value for key, value in entry.items()}
    return _checked(mapped(Expectation, renamed, place), "direction", DIRECTIONS, place)
