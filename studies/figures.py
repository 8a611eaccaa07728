"""What a figure of a claim shows: points with their seeds, gathered from records; drawn by `studies.drawing`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.checks import wrong
from studies.claims import Claim, Figure
from studies.evidence import Evidence
from studies.numbers import deviation


@dataclass(frozen=True)
class Point:
    """A metric of one arm: the values of its seeds."""

    x: Any
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.values)

    @property
    def around(self) -> float:
        """Sample deviation; nothing for one seed."""
        return deviation(self.values) or 0.0


@dataclass(frozen=True)
class Course:
    """A curve of one arm: that of every seed, and the points at the places that all have."""

    seeds: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def points(self) -> list[Point]:
        """By x, of all seeds."""
        found = [dict(points) for points in self.seeds]
        shared = sorted(set(found[0]).intersection(*found[1:]))
        return [Point(x, tuple(points[x] for points in found)) for x in shared]


@dataclass(frozen=True)
class Map:
    """A map of one run, z[y][x]."""

    seed: int
    x: Sequence[float]
    y: Sequence[float]
    z: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Gathered:
    """What there is to draw; names without any run are left out.

    Attributes:
        series: by name, of the kind's type: `Point`s of lines and bars, a `Course`, a `Map`.
        reference: by name.
    """

    series: Mapping[str, Any]
    reference: Mapping[str, Point]


def gather(claim: Claim, figure: Figure, evidence: Evidence) -> Gathered:
    """From the records.

    Raises:
        UsageError: there are runs of its arms, and none has what it shows.
    """
    readers: dict[str, Callable[[Claim, Figure, Evidence], Mapping[str, Any]]] = {
        "lines": _lines,
        "bars": _bars,
        "curves": _courses,
        "map": _maps,
    }
    series = {name: found for name, found in readers[figure.kind](claim, figure, evidence).items() if found}
    runs = any(evidence.records(claim, arm) for arm in figure.arms if arm not in figure.reference.values())
    if runs and not series:
        raise wrong(claim.file, f"figures {figure.file}", figure.shows, "no run of its arms has it")
    points = ((name, _point(claim, arm, figure.metric, evidence)) for name, arm in figure.reference.items())
    return Gathered(series, {name: point for name, point in points if point})


def is_empty(claim: Claim, figure: Figure, evidence: Evidence) -> bool:
    """Whether there is nothing to draw yet."""
    return not gather(claim, figure, evidence).series


def alt(claim: Claim, figure: Figure, evidence: Evidence) -> str:
    """What a figure shows, for those who do not see it."""
    names = ", ".join(_names(claim, figure, evidence))
    axes = " over ".join(text for text in (figure.y or figure.shows, figure.x) if text)
    return " ".join(f"{axes}: {names}".replace("[", "(").replace("]", ")").split())


def _names(claim: Claim, figure: Figure, evidence: Evidence) -> list[str]:
    found = gather(claim, figure, evidence)
    return [*found.series, *found.reference]


def _point(claim: Claim, arm: str, metric: str, evidence: Evidence, x: Any = None) -> Point | None:
    values = evidence.values(claim, arm, metric)
    return Point(x, tuple(values.values())) if values else None


def _lines(claim: Claim, figure: Figure, evidence: Evidence) -> dict[str, list[Point]]:
    return {
        name: [point for x, arm in points.items() if (point := _point(claim, arm, figure.shows, evidence, x))]
        for name, points in figure.series.items()
    }


def _bars(claim: Claim, figure: Figure, evidence: Evidence) -> dict[str, Point | None]:
    return {evidence.label(claim, arm): _point(claim, arm, figure.shows, evidence) for arm in figure.series}


def _courses(claim: Claim, figure: Figure, evidence: Evidence) -> dict[str, Course | None]:
    return {name: _course(claim, figure.shows, arm, evidence) for name, arm in figure.series.items()}


def _course(claim: Claim, curve: str, arm: str, evidence: Evidence) -> Course | None:
    found = [record.curves[curve] for record in evidence.records(claim, arm) if record.curves.get(curve)]
    seeds = tuple(tuple(sorted((float(x), float(y)) for x, y in points if x is not None and y is not None)) for points in found)
    return Course(tuple(filter(None, seeds))) if any(seeds) else None


def _maps(claim: Claim, figure: Figure, evidence: Evidence) -> dict[str, Map | None]:
    return {name: _map(claim, figure.shows, arm, evidence) for name, arm in figure.series.items()}


def _map(claim: Claim, name: str, arm: str, evidence: Evidence) -> Map | None:
    """Of the first seed that has it: the mean of maps would be smoother than each."""
    found = next((record for record in evidence.records(claim, arm) if _has_heights(record.maps.get(name))), None)
    return None if found is None else Map(found.seed, found.maps[name]["x"], found.maps[name]["y"], found.maps[name]["z"])


def _has_heights(found: Mapping[str, Any] | None) -> bool:
    return found is not None and any(z is not None for row in found["z"] for z in row)


def write(claim: Claim, figure: Figure, evidence: Evidence, folder: Path) -> Path | None:
    """Draw a figure as SVG into a folder; None where there is nothing to draw yet."""
    found = gather(claim, figure, evidence)
    if not found.series:
        return None
    from studies.drawing import save  # the heavy libraries are for pictures alone

    path = folder / figure.file
    save(figure, found, path)
    return path
