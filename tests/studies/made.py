"""Small claims and records in a folder."""

import json

import yaml

from studies.evidence import read_evidence

ARMS = {"new": {"label": "New"}, "old": {"label": "Old"}}
SAID = {"title": "New against old", "source": "Paper, arXiv 2302.02210", "statement": "New is better."}


def claim(folder, name="C1", **settings):
    """Write a claim file; gives its path."""
    path = folder / "studies" / "claims" / f"{name.lower()}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"id": name, **SAID, "arms": ARMS, **settings}, sort_keys=False))
    return path


def arms(folder, entries, **settings):
    """Write the file of the claim C90 into a folder; arms without a label are called by their names."""
    labelled = {name: {"label": name} | entry for name, entry in entries.items()}
    (folder / "c90.yaml").write_text(yaml.safe_dump({"id": "C90", **SAID, "arms": labelled, **settings}))


def content(claim="C1", arm="new", seed=0, **settings):
    """A record."""
    return {
        "claim": claim,
        "arm": arm,
        "seed": seed,
        "command": f"python train.py seed={seed}",
        "further_commands": {},
        "starts": {},
        "metrics": {},
        "curves": {},
        "maps": {},
        "wall_seconds": 60.0,
        "machine": "Some CPU, 2 cores, 1 thread",
        "device": "cpu",
        "versions": {"torch": "2.14", "timm": "1.0"},
        "git_commit": "abc",
        "date": "2026-11-21",
        "format": 2,
    } | settings


def record(folder, **settings):
    """Write a record as any program could; gives its path."""
    made = content(**settings)
    path = folder / "results" / made["claim"] / f"{made['arm']}-seed{made['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))
    return path


def runs(folder, arm, values, claim="C1", metric="top1", **settings):
    """A record for every value, seeds from 0."""
    for seed, value in enumerate(values):
        record(folder, claim=claim, arm=arm, seed=seed, metrics={metric: value}, **settings)


def evidence(folder):
    """What is in both folders."""
    return read_evidence(folder / "studies" / "claims", folder / "results")
