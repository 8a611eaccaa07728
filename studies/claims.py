"""What the files in `studies/claims/` hold: a claim, the runs it needs, what is expected of them and how they are shown."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from studies.checks import Fields, is_format, is_list, is_mapping, is_number, is_text, is_whole, wrong

FIRST, LAST = ("START", "AIM"), ("PEERS", "TUNE")
CLAIM = re.compile(r"C(\d+)")
DIRECTIONS = ("higher", "lower", "within", "near")
KINDS = ("lines", "bars", "curves", "map")
HEADLINES = 2
USUAL_METRIC = "top1"
_ID = re.compile(r"[A-Z]+\d*")
_ARM = re.compile(r"[A-Za-z0-9_-]+")
_FILE = re.compile(r"[a-z0-9-]+\.svg")
_MERGE = "tag:yaml.org,2002:merge"
_CLAIM_KEYS = ("id", "title", "source", "statement", "seeds", "arms", "expect", "tables", "figures", "why", "readme")
_FIGURE_KEYS = ("file", "kind", "metric", "curve", "x", "y", "z", "series", "reference", "caption", "headline")


@dataclass(frozen=True)
class Expectation:
    """What one metric of an arm should be beside that of another.

    Attributes:
        what: its name on the page.
        metric: of both arms.
        arm: of this claim, or `CLAIM/arm`.
        than: the other arm, or a number.
        direction: one of `DIRECTIONS`; `within` is not below `than` by more than the margin, `near` not away from it by more.
        margin: `by` in the file, in the unit of the metric.
        format: of the difference on the page.
    """

    what: str
    metric: str
    arm: str
    than: str | float
    direction: str
    margin: float = 0.0
    format: str = "+.2f"


@dataclass(frozen=True)
class Table:
    """A row an arm, a column a metric: `{metric: heading}`, `{metric: format}`; `{arm: text}` where the label of an arm would not do."""

    rows: tuple[str, ...]
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
        shows: the metric (lines, bars), or the name of the curve or map.
        x: label of the horizontal axis, empty for bars.
        y: label of the other axis.
        z: of a map, what its heights are.
        series: of lines `{name: {x: arm}}`, of the others `{name: arm}`; bars are named by the labels of their arms.
        reference: `{name: arm}`, drawn as lines across, not in maps.
        metric: of the references; that of the figure where it shows one.
        caption: below it.
        headline: whether the README has it too.
    """

    file: str
    kind: str
    shows: str
    x: str
    y: str
    z: str
    series: Mapping[str, Any]
    reference: Mapping[str, str]
    metric: str = USUAL_METRIC
    caption: str = ""
    headline: bool = False

    @property
    def arms(self) -> tuple[str, ...]:
        """All that it shows, references last."""
        named = self.series.values()
        shown = [arm for points in named for arm in points.values()] if self.kind == "lines" else list(named)
        return (*shown, *self.reference.values())


@dataclass(frozen=True)
class Claim:
    """One file. `arms` are as in the file: what but their `label` stands in them is the runner's; `readme` is the README's."""

    file: Path
    id: str
    title: str
    source: str
    statement: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[str, Any]]
    expect: tuple[Expectation, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    why: str = ""
    readme: str = ""

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds that an arm is to be run with."""
        return tuple(self.arms[arm].get("seeds", self.seeds))

    def place(self, arm: str) -> tuple[str, str]:
        """Claim and name of an arm as this claim calls it: `arm` or `CLAIM/arm`."""
        claim, slash, name = arm.rpartition("/")
        return (claim if slash else self.id), name


def load_claims(folder: Path) -> dict[str, Claim]:
    """All claims by id, in the order of the page.

    Raises:
        UsageError: there is none, or one line that names file, key, value and what is allowed.
    """
    found = [load_claim(path) for path in sorted(folder.glob("*.yaml"))]
    if not found:
        raise wrong(folder, "*.yaml", None, "allowed is a folder with claims")
    claims: dict[str, Claim] = {}
    for claim in sorted(found, key=_order):
        if claim.id in claims:
            raise wrong(claim.file, "id", claim.id, f"taken by {claims[claim.id].file}")
        claims[claim.id] = claim
    for claim in claims.values():
        _check_arms(claim, claims)
    _check_figures(claims)
    return claims


def load_claim(path: Path) -> Claim:
    """One file, checked by itself; arms of other claims are not looked for.

    Raises:
        UsageError: one line that names file, key, value and what is allowed.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  (a safe loader)
    except yaml.YAMLError as error:
        raise wrong(path, "content", " ".join(str(error).split()), "allowed is YAML") from error
    fields = Fields(path, "", content, _CLAIM_KEYS)
    return Claim(
        file=path,
        id=fields.take("id", lambda value: is_text(value) and _ID.fullmatch(value) is not None, "capitals and a number, as C1"),
        title=fields.text("title"),
        source=fields.text("source"),
        statement=fields.text("statement"),
        seeds=_seeds(fields, default=[0, 1, 2]),
        arms=_arms(fields),
        expect=tuple(_expectation(entry) for entry in _entries(fields, "expect", ("what", "metric", "arm", "than", "is", "by", "format"))),
        tables=tuple(_table(entry) for entry in _entries(fields, "tables", ("caption", "rows", "columns", "formats", "labels"))),
        figures=tuple(_figure(entry) for entry in _entries(fields, "figures", _FIGURE_KEYS)),
        why=fields.text("why", ""),
        readme=fields.text("readme", ""),
    )


class _Loader(yaml.SafeLoader):
    """A key that stands twice is an error: YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002  (inherited)
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = key_node.value if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _order(claim: Claim) -> tuple[int, int, str]:
    """START, AIM, C1 to the last C, PEERS, TUNE, further ones by id."""
    if claim.id in FIRST:
        return 0, FIRST.index(claim.id), ""
    if number := CLAIM.fullmatch(claim.id):
        return 1, int(number[1]), ""
    return (2, LAST.index(claim.id), "") if claim.id in LAST else (3, 0, claim.id)


def _entries(fields: Fields, name: str, keys: Sequence[str]) -> Iterator[Fields]:
    found = fields.take(name, is_list(lambda entry: isinstance(entry, dict)), "a list of mappings", [])
    return (Fields(fields.file, f"{name}[{number}]", entry, keys) for number, entry in enumerate(found))


def _seeds(fields: Fields, default: list[int]) -> tuple[int, ...]:
    fits = is_list(is_whole)
    return tuple(
        fields.take("seeds", lambda value: fits(value) and 0 < len(value) == len(set(value)), "a list of seeds, as [0, 1, 2]", default)
    )


def _arms(fields: Fields) -> dict[str, dict[str, Any]]:
    arms = fields.take("arms", lambda value: isinstance(value, dict), "a mapping from names to how they are run", {})
    for name, arm in arms.items():
        if not isinstance(name, str) or not _ARM.fullmatch(name):
            raise wrong(fields.file, "arms", name, "allowed are names of letters, digits, _ and -")
        settings = Fields(fields.file, f"arms.{name}", arm, tuple(arm) if isinstance(arm, dict) else ("label",))
        settings.text("label")
        _seeds(settings, default=[0])
    return arms


def _expectation(fields: Fields) -> Expectation:
    return Expectation(
        what=fields.text("what"),
        metric=fields.text("metric"),
        arm=fields.text("arm"),
        than=fields.take("than", lambda value: is_text(value) or is_number(value), "an arm or a number"),
        direction=fields.choice("is", DIRECTIONS),
        margin=float(fields.take("by", lambda value: is_number(value) and value >= 0, "a number from 0", 0.0)),
        format=f"+{fields.take('format', is_format, 'a format such as .2f', '.2f').removeprefix('+')}",
    )


def _table(fields: Fields) -> Table:
    rows = fields.take("rows", lambda value: is_list(is_text)(value) and value, "a list of arms")
    columns = fields.take("columns", is_mapping(is_text), "a mapping from metrics to headings")
    formats = fields.take(
        "formats", is_mapping(is_format, keys=lambda key: key in columns), "a mapping from its columns to .2f or the like", {}
    )
    labels = fields.take("labels", is_mapping(is_text, keys=lambda key: key in rows), "a mapping from its rows to texts", {})
    return Table(tuple(rows), columns, formats, labels, fields.text("caption", ""))


def _figure(fields: Fields) -> Figure:
    kind = fields.choice("kind", KINDS)
    for name in _UNUSED[kind]:
        if fields.has(name):
            raise fields.wrong(name, f"a figure of kind {kind} has none")
    has_metric = kind in {"lines", "bars"}
    metric = fields.text("metric") if has_metric else fields.text("metric", USUAL_METRIC)
    shows = metric if has_metric else fields.text("curve")
    return Figure(
        file=fields.take("file", lambda value: is_text(value) and _FILE.fullmatch(value) is not None, "a name such as c01-bits.svg"),
        kind=kind,
        shows=shows,
        x=fields.text("x", "") if kind in {"bars", "map"} else fields.text("x"),
        y=fields.text("y", "") if kind == "map" else fields.text("y"),
        z=fields.text("z", shows),
        series=_series(fields, kind),
        reference=fields.take("reference", is_mapping(is_text), "a mapping from names to arms", {}),
        metric=metric,
        caption=fields.text("caption", ""),
        headline=fields.take("headline", lambda value: isinstance(value, bool), "true or false", default=False),
    )


# What a kind of figure has no use for.
_UNUSED = {
    "lines": ("curve", "z"),
    "bars": ("curve", "x", "z"),
    "curves": ("z",),
    "map": ("metric", "reference"),
}


def _is_place(value: object) -> bool:
    return is_text(value) or is_number(value)


def _series(fields: Fields, kind: str) -> dict[str, Any]:
    if kind == "bars":
        arms = fields.take("series", lambda value: is_list(is_text)(value) and value, "a list of arms")
        return {arm: arm for arm in arms}
    entries, allowed = (is_mapping(is_text, keys=_is_place), "{name: {x: arm}}") if kind == "lines" else (is_text, "{name: arm}")
    return fields.take("series", lambda value: is_mapping(entries)(value) and value, f"a mapping {allowed}")


def _check_arms(claim: Claim, claims: Mapping[str, Claim]) -> None:
    """Raise `UsageError` where an arm is named that no claim has."""
    used = [(f"expect[{i}].arm", one.arm) for i, one in enumerate(claim.expect)]
    used += [(f"expect[{i}].than", one.than) for i, one in enumerate(claim.expect) if isinstance(one.than, str)]
    used += [(f"tables[{i}].rows", arm) for i, one in enumerate(claim.tables) for arm in one.rows]
    used += [(f"figures[{i}]", arm) for i, one in enumerate(claim.figures) for arm in one.arms]
    for key, arm in used:
        check_arm(claim, claims, key, arm)


def check_arm(claim: Claim, claims: Mapping[str, Claim], key: str, arm: str) -> None:
    """Raise `UsageError` unless there is an arm of that name."""
    owner, name = claim.place(arm)
    if owner not in claims:
        raise wrong(claim.file, key, arm, f"no such claim, allowed are {', '.join(claims)}")
    if name not in claims[owner].arms:
        raise wrong(claim.file, key, arm, f"no such arm, allowed are {', '.join(claims[owner].arms) or 'none'}")


def _check_figures(claims: Mapping[str, Claim]) -> None:
    """Raise `UsageError` where two figures have one file, or the README would get too many."""
    owners: dict[str, Path] = {}
    headlines = 0
    for claim in claims.values():
        for number, figure in enumerate(claim.figures):
            if figure.file in owners:
                raise wrong(claim.file, f"figures[{number}].file", figure.file, f"taken by {owners[figure.file]}")
            owners[figure.file] = claim.file
            headlines += figure.headline
            if headlines > HEADLINES:
                raise wrong(claim.file, f"figures[{number}].headline", figure.headline, f"the README has room for {HEADLINES}")
