"""Small claims and records in a folder."""

import dataclasses

import yaml

from evidence.claims.records import Record, add_record
from evidence.pages.evidence import read_evidence

ARMS = {"new": {"label": "New"}, "old": {"label": "Old"}, "idle": {"label": "not run"}}
SAID = {
    "title": "New against old",
    "source": "Paper, arXiv 2302.02210",
    "statement": "New is better.",
}
RECORD = Record(
    claim="C1",
    arm="new",
    seed=0,
    command="python train.py seed=0",
    further_commands={},
    starts={},
    metrics={},
    curves={},
    maps={},
    wall_seconds=60.0,
    machine="Some CPU",
    device="cpu",
    versions={"torch": "2.14"},
    git_commit="abc",
    date="2026-11-21",
)


def claim(folder, name="C1", **settings):
    """Write a claim file, and return its path."""
    path = folder / "claims" / f"{name.lower()}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"id": name, **SAID, "arms": ARMS, **settings}, sort_keys=False))
    return path


def record(folder, **settings):
    """Write a record."""
    add_record(folder / "records", dataclasses.replace(RECORD, **settings))


def runs(folder, arm, values, claim="C1", metric="top1", **settings):
    """A record for every value, seeds from 0."""
    for seed, value in enumerate(values):
        record(folder, claim=claim, arm=arm, seed=seed, metrics={metric: value}, **settings)


def evidence(folder):
    """What is in both folders, and the claim C1."""
    found = read_evidence(folder / "claims", folder / "records")
    return found, found.claims["C1"]
