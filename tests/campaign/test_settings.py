"""Each setting of each command with each kind of mistake in it. Oracle: one line that names the setting, or the reviewed list `allowed`.

Some of the cases, others of each base.
"""

import os

import pytest
from omegaconf import OmegaConf

from qat.tasks import analyze, export
from tests.campaign.bases import TABLE, bases
from tests.campaign.judging import thinned, verdict
from tests.campaign.mutations import KINDS, mutations
from tests.campaign.running import attempt, no_steps, stop
from tests.conftest import train

# A number that shares no factor with those of kinds and settings: all kinds come up.
EVERY = int(os.environ.get("QAT_CAMPAIGN_EVERY", "31"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, float_run):
    """The configs by name, from a float run and a quantized one that tracked its oscillation."""
    best = float_run / "checkpoints" / "best.ckpt"
    run = train(
        tmp_path_factory.mktemp("campaign") / "run",
        "quant=ofq_4bit",
        "callbacks=[default,oscillation]",
        f"ckpt={best}",
        "trainer.devices=1",
    )
    return {base.name: base for base in bases(best, run / "checkpoints" / "last.ckpt")}


def tried(base):
    return thinned([one for group in base.groups for one in mutations(base.cfg, group)], EVERY, first=len(base.name))


@pytest.mark.long
@pytest.mark.parametrize("name", [entry[0] for entry in TABLE])
def test_every_mistake_is_one_line_that_names_it(tmp_path, monkeypatch, prepared, name):
    monkeypatch.chdir(tmp_path)
    base, wrong, cases = prepared[name], [], tried(prepared[name])
    with no_steps():
        for number, mutation in enumerate(cases):
            cfg = mutation.applied(base.cfg)
            OmegaConf.update(cfg, "run_dir", str(tmp_path / str(number)))
            outcome = attempt(base.task, cfg)
            found = verdict(base, mutation, outcome)
            if found:
                wrong.append(f"{mutation}: {found}: {outcome.message[:200]}")
    assert cases
    assert wrong == []


@pytest.mark.long
@pytest.mark.parametrize("name", [entry[0] for entry in TABLE])
def test_the_configs_are_valid_as_they_are(tmp_path, monkeypatch, prepared, name):
    monkeypatch.chdir(tmp_path)
    base = prepared[name]
    OmegaConf.update(base.cfg, "run_dir", str(tmp_path / "run"))
    with no_steps():
        outcome = attempt(base.task, base.cfg)
    assert outcome.kind == "reached", outcome.message


def test_what_would_compute_is_where_it_is_stopped():
    with no_steps():
        assert export.kept is analyze.write_outcome is stop


@pytest.mark.long
def test_there_are_hundreds_of_them_of_all_kinds(prepared):
    cases = [mutation for base in prepared.values() for mutation in tried(base)]
    assert len(cases) > 200
    assert {mutation.kind for mutation in cases} >= set(KINDS)
    everything = sum(len(list(mutations(base.cfg, group))) for base in prepared.values() for group in base.groups)
    assert everything > 5000
