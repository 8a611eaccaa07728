"""Claim files: a claim, the runs that it needs, their expected results, its tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qat.errors import UsageError


@dataclass(frozen=True)
class FollowUp:
    """A further command, run on the `best` or `last` weights of a finished run.

    Its results join the run's record.

    Attributes:
        command: train, ptq, analyze, eval, peers or real.
        use: names of presets.
        set: overrides that follow the overrides of the presets.
        weights: best or last.
    """

    command: str
    use: Sequence[str] = ()
    set: Sequence[str] = ()
    weights: str = "best"


@dataclass(frozen=True)
class Arm:
    """One line of a comparison.

    Attributes:
        claim: id of the claim whose file defines the arm.
        name: key of the arm in that file.
        label: name of the arm on the page.
        command: train, ptq, analyze, eval, peers or real.
        use: names of presets.
        set: overrides that follow the overrides of the presets.
        ckpt: `CLAIM/arm` or `CLAIM/arm@last`, the source of the initial weights; None = random.
        teacher: source of the teacher's weights, in the form of `ckpt`.
        seeds: seeds of the runs.
        further: further commands on the trained weights, by name.
        best_of: arms to choose from; the settings of the arm with the highest validation top-1
            are added after `set`.
        keep: True = store the best weights in `evidence/weights`, for other arms.
        retired: why this version of qat cannot repeat the runs; the records name a commit that can.
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
    further: Mapping[str, FollowUp] = field(default_factory=dict)
    best_of: Sequence[str] = ()
    keep: bool = False
    retired: str = ""

    @property
    def path(self) -> str:
        """Name of the arm in other arms, `CLAIM/arm`."""
        return f"{self.claim}/{self.name}"

    def sources(self) -> list[str]:
        """Arms whose weights this arm loads, `CLAIM/arm[@last]`."""
        return [source for source in (self.ckpt, self.teacher) if source]

    def needs(self) -> list[str]:
        """Arms that must have run before this arm."""
        return [source.partition("@")[0] for source in self.sources()] + list(self.best_of)


@dataclass(frozen=True)
class Expectation:
    """Expected difference of a metric between two arms.

    Attributes:
        what: name of the comparison on the page.
        metric: name of the metric.
        arm: an arm of this claim, or `CLAIM/arm`.
        than: the other arm, or a number, with which `arm` is compared.
        direction: `higher` or `lower` by more than `margin`; `within`: at most `margin` below the
            other arm; or `near`: at most `margin` away from the other arm.
        margin: margin in the unit of the metric.
        format: format of the difference on the page.
        judged: True = the expectation has a verdict and a row in docs/accuracy.md. The first
            expectation of a claim always has them.
    """

    what: str
    metric: str
    arm: str
    than: str | float
    direction: str
    margin: float = 0.0
    format: str = ".2f"
    judged: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a row for each arm and a column for each metric.

    Attributes:
        rows: arms.
        columns: `{metric: heading}`.
        formats: `{metric: format}`.
        labels: `{arm: text}`, used instead of the arm's own label.
        caption: text above the table.
    """

    rows: Sequence[str]
    columns: Mapping[str, str]
    formats: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure of a claim's page.

    Attributes:
        file: name of the file.
        kind: lines, scatter, curves or map.
        series: `{name: {x: arm}}` for lines, `{name: {label of a point: arm}}` for a scatter,
            else `{name: arm}`.
        metric: metric of lines, of a scatter, and of the references.
        along: metric of a scatter's horizontal axis, which is logarithmic.
        curve: name of the curve or the map, for the other kinds. Empty = each series shows the
            curve of its own name.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        reference: `{name: arm}`, drawn as horizontal lines; not in maps.
        caption: text below the figure.
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
    """A claim file; `why` is the text for the page, `readme` the text for the README."""

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
    """All claims by id, in the order of the file names.

    Raises:
        UsageError: a file is not a claim; the message is one line and names the file.
    """
    claims = {}
    for path in sorted(folder.glob("[!_]*.yaml")):
        claim = load_claim(path)
        claims[claim.id] = claim
    return claims


def load_claim(path: Path) -> Claim:
    """Read a claim file.

    Raises:
        UsageError: the file is not a claim; the message is one line and names the file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in content.items():
            if isinstance(value, str):
                content[key] = value.strip()
        arms = {name: _arm(content, name, entry) for name, entry in content.pop("arms", {}).items()}
        expect = [Expectation(**entry) for entry in content.pop("expect", ())]
        tables = [Table(**entry) for entry in content.pop("tables", ())]
        figures = [Figure(**entry) for entry in content.pop("figures", ())]
        return Claim(path, arms=arms, expect=expect, tables=tables, figures=figures, **content)
    except (yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{path}: must be a claim ({' '.join(str(error).split())})") from error


def _arm(content: Mapping[str, Any], name: str, entry: dict[str, Any]) -> Arm:
    claim_id = content["id"]
    entry = {"seeds": content.get("seeds", (0, 1, 2)), **entry}
    further = entry.get("further", {})
    entry["further"] = {title: FollowUp(**command) for title, command in further.items()}
    candidates = entry.get("best_of", ())
    entry["best_of"] = [path if "/" in path else f"{claim_id}/{path}" for path in candidates]
    return Arm(claim_id, name, **entry)
