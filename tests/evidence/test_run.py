"""Runs and their records. Oracles: settings and orders written out by hand; the files of a run itself."""

import csv
import math
import shutil
import subprocess
import sys

import pytest

import qat
from evidence.claims.arms import ROOT, Arms, preset
from evidence.claims.records import add_record, read_records
from evidence.claims.run import PROGRAMS, command_line, execute, run_all, run_one
from tests.commands import typed
from tests.conftest import compose, results
from tests.errors import usage_error
from tests.evidence import made
from tests.tiny import identical

ARMS = {
    "float": {"use": ["cifar"], "seeds": [0], "keep": True},
    "slow": {
        "ckpt": "C1/float",
        "teacher": "C1/float@last",
        "set": ["optimizer.lr=1e-4"],
        "seeds": [0],
    },
    "fast": {"ckpt": "C1/float", "set": ["optimizer.lr=1e-3"], "seeds": [0]},
    "chosen": {"best_of": ["slow", "C1/fast"], "set": ["quant=fp"], "seeds": [0, 1]},
    "calibrated": {"command": "ptq", "ckpt": "C1/chosen", "seeds": [0, 1]},
    "seen": {"command": "analyze", "ckpt": "C1/calibrated", "seeds": [1]},
}


def arms_of(folder, entries=ARMS):
    path = made.claim(
        folder, arms={name: {"label": name, **entry} for name, entry in entries.items()}
    )
    return Arms(path.parent, folder / "records", folder / "runs")


def named(runs):
    return [(arm.name, seed) for arm, seed in runs]


def test_records_go_there_and_back(tmp_path):
    made.record(
        tmp_path,
        seed=10,
        metrics={"top1": 61.2, "loss": math.nan},
        curves={"val": [[1, 50.0], [2, math.inf]]},
    )
    made.record(tmp_path, seed=9)
    made.record(tmp_path, seed=9, command="again")
    again, one = read_records(tmp_path / "records")
    assert (again.seed, again.command) == (9, "again")
    assert (one.metrics, one.curves) == (
        {"top1": 61.2, "loss": None},
        {"val": [[1, 50.0], [2, None]]},
    )
    add_record(tmp_path / "other", one)
    assert read_records(tmp_path / "other") == [one]
    (tmp_path / "other" / "C1.jsonl").write_text('{"claim": "C1"}\n')
    with usage_error(r"C1.jsonl, line 1: must be a record"):
        read_records(tmp_path / "other")


def test_settings_are_presets_then_own_then_where_it_starts(tmp_path):
    arms, kept = arms_of(tmp_path), tmp_path / "weights" / "C1" / "float-seed0.pt"
    assert arms.settings(arms["C1/float"], 0) == [*preset(["cifar"]), "seed=0"]
    last = tmp_path / "runs" / "C1" / "float-seed0" / "checkpoints" / "last.ckpt"
    assert arms.settings(arms["C1/slow"], 0) == [
        "optimizer.lr=1e-4",
        f"ckpt={kept}",
        f"teacher.ckpt={last}",
        "seed=0",
    ]
    assert arms.settings(arms["C1/seen"], 1) == [
        f"ckpt={tmp_path}/runs/C1/calibrated-seed1/quantized.ckpt",
        "seed=1",
    ]
    with usage_error("^C1/slow: must have a record with val_top1"):
        arms.settings(arms["C1/chosen"], 1)
    made.record(tmp_path, arm="slow", metrics={"val_top1": 61.0})
    made.record(tmp_path, arm="fast", metrics={"val_top1": 60.0})
    assert arms.settings(arms["C1/chosen"], 1) == ["optimizer.lr=1e-4", "quant=fp", "seed=1"]


def test_a_run_of_other_settings_is_refused(tmp_path, monkeypatch):
    calls = []

    def write(line, **options):
        calls.append(line)
        (tmp_path / "results.json").write_text("{}")

    monkeypatch.setattr("evidence.claims.run.subprocess.run", write)
    for _ in range(2):
        execute("train", tmp_path, ["a=1"], None)
    assert len(calls) == 1
    with usage_error("contains a run of other settings; delete the folder"):
        execute("train", tmp_path, ["a=2"], None)


def test_runs_come_after_those_they_need_and_once(tmp_path):
    arms = arms_of(tmp_path)
    assert named(arms.ordered(["C1/seen"])) == [
        ("float", 0),
        ("slow", 0),
        ("fast", 0),
        ("chosen", 1),
        ("calibrated", 1),
        ("seen", 1),
    ]
    everything = named(arms.ordered())
    assert len(everything) == len(set(everything)) == 8
    assert everything.index(("chosen", 0)) < everything.index(("chosen", 1))
    with usage_error("'C7': must be one of C1"):
        arms.ordered(["C7"])
    with usage_error("C1/a needs 'C91/float': must be one of the arms of"):
        arms_of(tmp_path, {"a": {"ckpt": "C91/float"}})
    with usage_error(r"--seed 1: C1/float has the seeds \[0\]"):
        run_one(arms["C1/float"], 1, None, arms)


def test_what_a_run_starts_from_is_made_again_where_it_is_lost(tmp_path):
    arms = arms_of(tmp_path)
    for name in ("float", "slow"):
        made.record(tmp_path, arm=name)
    assert named(arms.to_do(["C1/fast"])) == [("float", 0), ("fast", 0)]
    kept = arms.weights_file(arms["C1/float"], 0)
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert named(arms.to_do(["C1/fast"])) == [("fast", 0)]
    assert named(arms.to_do(["C1/slow"])) == []


@pytest.mark.long
def test_every_run_of_the_repository_composes():
    arms = Arms()
    for arm, seed in arms.ordered():
        is_module = arm.command in PROGRAMS
        if not (is_module or arm.retired or arm.best_of) and seed == arm.seeds[0]:
            assert compose(
                arm.command,
                *command_line(
                    arm.command, arms.run_dir(arm, seed), arms.settings(arm, seed), str(ROOT)
                )[2:],
            )


def test_a_run_leaves_a_record(tmp_path, monkeypatch):
    def in_this_process(line, **options):
        if line[0] != sys.executable:
            return original(line, **options)
        code, out = typed(*line[1:], cwd=options["cwd"])
        assert code == 0, out
        return None

    original = subprocess.run
    monkeypatch.setattr("evidence.claims.run.subprocess.run", in_this_process)
    tiny = [
        "data=digits",
        "model.args.depth=1",
        "model.args.embed_dim=24",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=4",
    ]
    bits = {
        "command": "analyze",
        "set": ["analysis=robustness", "analysis.parts=[bits]", "analysis.bits=[3]", "images=40"],
    }
    trained = {
        "use": ["tracked"],
        "set": [*tiny, "quant=ofq_2bit", "loss=ce"],
        "keep": True,
        "further": {"cost": bits},
        "seeds": [3],
    }
    arms = arms_of(tmp_path, {"trained": trained})
    run_one(arms["C1/trained"], 3, None, arms)
    (record,), run_dir = (
        read_records(tmp_path / "records"),
        tmp_path / "runs" / "C1" / "trained-seed3",
    )
    found = results(run_dir)
    for key in ("top1", "val_top1", "loss"):
        assert record.metrics[key] == found[key]
    shares = [sum(record.hits) / found["images"], found["top1"] / 100]
    assert shares[0] == pytest.approx(shares[1])
    *_, total = csv.DictReader((run_dir / "oscillation.csv").open())
    assert record.metrics["oscillating"] == 100 * float(total["oscillating"]) / float(
        total["weights"]
    )
    assert record.metrics["kurtosis"] > 1
    (row,) = [
        row
        for row in csv.DictReader((run_dir / "cost" / "robustness.csv").open())
        if row["part"] == "bits" and row["bits"] == "3"
    ]
    assert [3.0, float(row["top-1 (%)"])] in record.curves["cost.bits"]
    assert record.command.startswith(
        f"python train.py run_dir={run_dir} 'callbacks=[default,oscillation]' data=digits"
    )
    kept, best = (
        qat.load(path).state_dict()
        for path in (
            arms.weights_file(arms["C1/trained"], 3),
            run_dir / "checkpoints" / "best.ckpt",
        )
    )
    assert identical(kept, best)
    assert named(arms.to_do()) == []


def test_a_run_that_fails_holds_up_those_that_need_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    entries = {"broken": {"set": ["quant.bits=99"]}, "waiting": {"ckpt": "C1/broken"}, "alone": {}}
    arms = arms_of(tmp_path, {name: {"seeds": [3], **entry} for name, entry in entries.items()})
    assert run_all((), None, 2, arms) == 3
    runs = tmp_path / "runs" / "C1"
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == [
        "alone-seed3",
        "broken-seed3",
    ]
    assert named(arms.to_do()) == [("broken", 3), ("waiting", 3), ("alone", 3)]
