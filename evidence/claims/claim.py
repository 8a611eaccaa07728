"""What the files in `evidence/claims/` hold: a claim, the runs it needs, what is expected of them and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qat.errors import UsageError


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
        command: train, ptq, analyze, eval or peers.
        use: names of presets.
        set: overrides after those of the presets.
        ckpt: `CLAIM/arm` or `CLAIM/arm@last`, whose weights it starts from; None = random ones.
        teacher: whose weights its teacher has, as in `ckpt`.
        seeds: numbers of its runs.
        further: commands on its weights, by name.
        best_of: arms whose settings come after `set`: those of the one with the highest validation top-1.
        keep: its best weights lie in `evidence/weights`, where other arms take them from.
        retired: why this version cannot make its runs any more; their records name the commit that made them.
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
    retired: str = ""

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
        direction: higher, lower, within (not below `than` by more than the margin) or near (not further from it).
        margin: in the unit of the metric.
        format: of the difference on the page.
    """

    what: str
    metric: str
    arm: str
    than: str | float
    direction: str
    margin: float = 0.0
    format: str = ".2f"


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
        file: its name.
        kind: lines, scatter, curves or map.
        series: of lines `{name: {x: arm}}`, of a scatter `{name: {what a point is called: arm}}`, of the others `{name: arm}`.
        metric: of lines and of a scatter, and of the references.
        along: of a scatter: the metric of its horizontal axis, which is logarithmic.
        curve: name of the curve or the map, of the other kinds.
        x, y: labels of the axes.
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
    reference: Mapping[str, str] = field(default_factory=dict)
    caption: str = ""


@dataclass(frozen=True)
class Claim:
    """One file; `why` is its text on the page, `readme` that in the README."""

    file: Path
    id: str
    title: str
    source: str
    statement: str = ""
    arms: Mapping[str, Arm] = field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    expect: Sequence[Expectation] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    why: str = ""
    readme: str = ""


def load_claims(folder: Path) -> dict[str, Claim]:
    """All claims by id, in the order of the names of their files.

    Raises:
        UsageError: one line that names the file and what is wrong with it.
    """
    return {claim.id: claim for claim in map(load_claim, sorted(folder.glob("[!_]*.yaml")))}


def load_claim(path: Path) -> Claim:
    """One file.

    Raises:
        UsageError: one line that names the file and what is wrong with it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content = {
            key: value.strip() if isinstance(value, str) else value
            for key, value in content.items()
        }
        arms = {name: _arm(content, name, entry) for name, entry in content.pop("arms", {}).items()}
        expect = [Expectation(**entry) for entry in content.pop("expect", ())]
        tables = [Table(**entry) for entry in content.pop("tables", ())]
        figures = [Figure(**entry) for entry in content.pop("figures", ())]
        return Claim(path, arms=arms, expect=expect, tables=tables, figures=figures, **content)
    except (yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{path}: must be a claim ({' '.join(str(error).split())})") from error


def _arm(content: Mapping[str, Any], name: str, entry: dict[str, Any]) -> Arm:
    entry = {"seeds": content.get("seeds", (0, 1, 2)), **entry}
    entry["further"] = {title: Further(**one) for title, one in entry.get("further", {}).items()}
    entry["best_of"] = [
        one if "/" in one else f"{content['id']}/{one}" for one in entry.get("best_of", ())
    ]
    return Arm(content["id"], name, **entry)
