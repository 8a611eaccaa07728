"""What the files of claims make of an arm. Oracle: the settings written out by hand."""

import json
import re

import pytest

from qat.errors import UsageError
from studies.arms import ROOT, Arms, Places, preset
from tests.studies import made

ARMS = {
    "float": {"use": ["cifar"], "seeds": [0]},
    "slow": {"ckpt": "C90/float", "teacher": "C90/float@last", "set": ["optimizer.lr=1e-4"], "seeds": [0]},
    "fast": {"ckpt": "C90/float", "set": ["optimizer.lr=1e-3"], "seeds": [0]},
    "chosen": {"best_of": ["slow", "C90/fast"], "set": ["quant=fp"], "seeds": [0, 1]},
    "calibrated": {"command": "ptq", "ckpt": "C90/chosen", "seeds": [0, 1]},
    "seen": {"command": "analyze", "ckpt": "C90/calibrated", "seeds": [1]},
}


@pytest.fixture
def arms(tmp_path):
    return read(tmp_path, ARMS)


def read(tmp_path, entries):
    folder = tmp_path / "claims"
    folder.mkdir(exist_ok=True)
    made.arms(folder, entries)
    return Arms.read(Places(folder, tmp_path / "results", tmp_path / "runs"))


def record(arms, name, seed, **metrics):
    path = arms.record_path(arms[f"C90/{name}"], seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metrics": metrics, "further_commands": {}}))


def named(runs):
    return [(arm.name, seed) for arm, seed in runs]


def test_settings_are_presets_then_own_then_where_it_starts(arms, tmp_path):
    start = tmp_path / "runs" / "C90" / "float-seed0" / "checkpoints"
    assert arms.settings(arms["C90/float"], 0) == [*preset(["cifar"]), "seed=0"]
    assert arms.settings(arms["C90/slow"], 0) == [
        "optimizer.lr=1e-4",
        f"ckpt={start}/best.ckpt",
        f"teacher.ckpt={start}/last.ckpt",
        "seed=0",
    ]
    calibrated = arms.settings(arms["C90/calibrated"], 1)
    assert calibrated == [f"ckpt={tmp_path}/runs/C90/chosen-seed1/checkpoints/best.ckpt", "seed=1"]
    assert arms.settings(arms["C90/seen"], 1) == [f"ckpt={tmp_path}/runs/C90/calibrated-seed1/quantized.ckpt", "seed=1"]


def test_the_best_of_a_search_is_that_of_the_highest_validation_accuracy(arms):
    record(arms, "slow", 0, val_top1=61.0, top1=60.0)
    record(arms, "fast", 0, val_top1=60.0, top1=62.0)
    assert arms.settings(arms["C90/chosen"], 1) == ["quant=fp", "optimizer.lr=1e-4", "seed=1"]


def test_runs_come_behind_those_they_need_and_once(arms):
    assert named(arms.runs(["C90/seen"])) == [("float", 0), ("slow", 0), ("fast", 0), ("chosen", 1), ("calibrated", 1), ("seen", 1)]
    everything = named(arms.runs())
    assert len(everything) == len(set(everything)) == 8
    assert everything.index(("chosen", 0)) < everything.index(("chosen", 1))


def test_a_run_is_done_when_its_record_has_all_that_is_asked_for(tmp_path):
    arms = read(tmp_path, {"float": {"seeds": [0], "further": {"seen": {"command": "analyze"}}}})
    arm = arms["C90/float"]
    assert not arms.is_done(arm, 0)
    record(arms, "float", 0)
    assert not arms.is_done(arm, 0)
    arms.record_path(arm, 0).write_text(json.dumps({"metrics": {}, "further_commands": {"seen": "python analyze.py"}}))
    assert arms.is_done(arm, 0)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"comand": "train"}, "arms.a=['comand']: must be a mapping with label, command, use"),
        ({"command": "fit"}, "arms.a.command='fit': must be one of train, ptq, analyze, eval, peers"),
        (
            {"further": {"x": {"command": "ptq", "sets": []}}},
            "arms.a.further.x=['sets']: must be a mapping with command, use, set, weights",
        ),
        ({"ckpt": "C91/float"}, "C90/a needs 'C91/float': must be one of the arms of"),
    ],
)
def test_mistakes_are_named(tmp_path, arm, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        read(tmp_path, {"a": arm})


def test_a_claim_that_does_not_exist_is_named(arms):
    with pytest.raises(UsageError, match="'C7': must be one of C90"):
        list(arms.runs(["C7"]))
    with pytest.raises(UsageError, match="use='cifer': must be one of cifar, tokens64"):
        preset(["cifer"])


@pytest.mark.long
def test_every_run_of_the_repository_composes():
    from studies.run import _compose

    arms = Arms.read(Places())
    for arm, seed in arms.runs():
        if arm.command != "peers" and not arm.best_of and seed == arm.seeds[0]:
            cfg = _compose(arm.command, arms.run_dir(arm, seed), arms.settings(arm, seed), str(ROOT))
            assert cfg.seed == seed


def test_what_a_run_starts_from_is_made_again_where_it_is_lost(arms):
    for name in ("float", "slow", "fast"):
        record(arms, name, 0, val_top1=1.0)
    assert named(arms.to_do(["C90/chosen"])) == [("chosen", 0), ("chosen", 1)]
    assert named(arms.to_do(["C90/slow"])) == []
    arms.record_path(arms["C90/slow"], 0).unlink()
    assert named(arms.to_do(["C90/slow"])) == [("float", 0), ("slow", 0)]
    for which in ("best", "last"):
        path = arms.run_dir(arms["C90/float"], 0) / "checkpoints" / f"{which}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert named(arms.to_do(["C90/slow"])) == [("slow", 0)]


def test_kept_weights_lie_beside_their_record(tmp_path):
    arms = read(tmp_path, ARMS | {"float": {"use": ["cifar"], "seeds": [0], "keep": True}})
    kept = tmp_path / "results" / "C90" / "float-seed0.pt"
    record(arms, "float", 0)
    assert named(arms.to_do(["C90/fast"])) == [("float", 0), ("fast", 0)]
    kept.write_bytes(b"weights")
    assert named(arms.to_do(["C90/fast"])) == [("fast", 0)]
    assert arms.settings(arms["C90/fast"], 0) == ["optimizer.lr=1e-3", f"ckpt={kept}", "seed=0"]
    assert arms.settings(arms["C90/slow"], 0)[2] == f"teacher.ckpt={tmp_path}/runs/C90/float-seed0/checkpoints/last.ckpt"
    assert arms.starts(arms["C90/fast"], 0) == {"C90/float": "9a129038d9a00aed"}
    assert arms.starts(arms["C90/chosen"], 0) == {}
