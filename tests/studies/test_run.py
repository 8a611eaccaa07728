"""Runs and their records. Oracles: the files of the run itself; what a second call leaves alone."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import qat
from studies.arms import ROOT, Arms, Places
from studies.run import outdated, run_all, run_one
from tests.studies import made

TINY = ["data=digits", "model.args.depth=1", "model.args.embed_dim=24", "trainer.max_epochs=1", "trainer.limit_train_batches=4"]
WIDTHS = ["analysis=robustness", "analysis.parts=[bits]", "analysis.bits=[3]", "images=40"]
ARMS = {
    "qat": {
        "use": ["tracked"],
        "set": [*TINY, "quant=ofq_2bit", "loss=ce"],
        "keep": True,
        "further": {"cost": {"command": "analyze", "set": WIDTHS}},
    },
    "broken": {"set": [*TINY, "quant.bits=99"]},
    "waiting": {"set": TINY, "ckpt": "C90/broken"},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "claims").mkdir()
    made.arms(folder / "claims", ARMS, seeds=[3])
    return Places(folder / "claims", folder / "results", folder / "runs")


@pytest.fixture(scope="module")
def record(places):
    run_one("C90/qat", 3, None, places)
    return json.loads((places.results / "C90" / "qat-seed3.json").read_text())


def test_a_record_holds_what_the_run_found(record, places):
    run_dir = places.runs / "C90" / "qat-seed3"
    results = json.loads((run_dir / "results.json").read_text())
    assert (record["claim"], record["arm"], record["seed"]) == ("C90", "qat", 3)
    kept = ("top1", "val_top1", "loss")
    assert [record["metrics"][key] for key in kept] == [results[key] for key in kept]
    *_, total = csv.DictReader((run_dir / "oscillation.csv").open())
    assert record["metrics"]["oscillating"] == 100 * float(total["oscillating"]) / float(total["weights"])
    assert record["metrics"]["kurtosis"] > 1
    rows = csv.DictReader((run_dir / "metrics.csv").open())
    assert record["curves"]["val_top1"] == [[0, next(float(row["val/top1"]) for row in rows if row["val/top1"])]]
    assert record["versions"]["torch"]
    assert record["command"].startswith(f"python train.py run_dir={run_dir} 'callbacks=[default,oscillation]' data=digits")


def test_queries_and_keys_are_those_of_the_folded_matrix(record, places):
    rows = list(csv.DictReader((places.runs / "C90" / "qat-seed3" / "oscillation.csv").open()))
    (qk,) = [row for row in rows if row["role"] == "qk"]
    assert record["metrics"]["qk.oscillating"] == pytest.approx(100 * float(qk["oscillating"]) / float(qk["weights"]), rel=1e-6)


def test_further_commands_are_part_of_it(record, places):
    run_dir = places.runs / "C90" / "qat-seed3"
    assert record["further_commands"]["cost"].startswith(f"python analyze.py run_dir={run_dir}/cost analysis=robustness")
    rows = [row for row in csv.DictReader((run_dir / "cost" / "robustness.csv").open()) if row["part"] == "bits"]
    assert record["curves"]["cost.bits"] == [[float(row["bits"]), float(row["top-1 (%)"])] for row in rows]
    assert record["metrics"]["cost.widths.3"] == next(float(row["top-1 (%)"]) for row in rows if float(row["bits"]) == 3)


def test_weights_are_kept_where_the_claim_says_so(record, places):
    kept = qat.load(places.results / "C90" / "qat-seed3.pt").state_dict()
    best = qat.load(places.runs / "C90" / "qat-seed3" / "checkpoints" / "best.ckpt").state_dict()
    assert list(kept) == list(best)
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert not (places.results / "C90" / "waiting-seed3.pt").exists()


def test_what_is_there_is_not_run_again(record, places):
    files = [path for path in places.runs.rglob("*") if path.is_file() and path.suffix == ".ckpt"]
    before = [path.stat().st_mtime_ns for path in files]
    assert files
    run_one("C90/qat", 3, None, places)
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_fails_holds_up_those_that_need_it_alone(record, places):
    assert run_all(["C90"], None, 2, places) == 2
    assert "quant.bits=99" in (places.runs / "C90" / "broken-seed3" / "study.log").read_text()
    assert not (places.results / "C90" / "waiting-seed3.json").exists()
    assert Arms.read(places).is_done(Arms.read(places)["C90/qat"], 3)


def test_a_record_of_other_settings_is_outdated(record, places, tmp_path):
    assert outdated(Arms.read(places), root=None) == []
    qat = ARMS["qat"]
    made.arms(tmp_path, {"qat": qat | {"set": [*qat["set"], "optimizer.lr=5e-3"]}}, seeds=[3])
    (found,) = outdated(Arms.read(Places(tmp_path, places.results, places.runs)), root=None)
    assert found.startswith(f"{places.results}/C90/qat-seed3.json: made by other commands than C90/qat asks for")


def test_a_record_made_from_other_weights_is_outdated(record, places, tmp_path):
    arms = {"qat": ARMS["qat"], "after": {"set": [*TINY, "quant=ofq_2bit", "loss=ce"], "ckpt": "C90/qat"}}
    made.arms(tmp_path, arms, seeds=[3])
    here = Places(tmp_path, tmp_path / "results", places.runs)
    shutil.copytree(places.results, here.results)
    run_one("C90/after", 3, None, here)
    assert json.loads((here.results / "C90" / "after-seed3.json").read_text())["starts"].keys() == {"C90/qat"}
    changed = qat.load(here.results / "C90" / "qat-seed3.pt")
    assert [line for line in outdated(Arms.read(here), root=None) if "after" in line] == []
    torch.nn.init.zeros_(next(changed.parameters()))
    qat.save(changed, here.results / "C90" / "qat-seed3.pt")
    (found,) = outdated(Arms.read(here), root=None)
    assert found.startswith(f"{here.results}/C90/after-seed3.json: made from other weights than those in {here.results}")


def test_a_peer_ends_with_the_run_that_started_it(tmp_path):
    peer = tmp_path / "peer"
    peer.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid.part && mv {tmp_path}/pid.part {tmp_path}/pid\nexec sleep 600\n")
    peer.chmod(0o755)
    script = f"import pathlib, studies.run as run; run.PEERS_PYTHON = {str(peer)!r}; run._run_peer(pathlib.Path('x'), [], None)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as process:
        pid = tmp_path / "pid"
        assert happens(pid.exists, within_s=60)
        process.terminate()
        assert process.wait(timeout=30) == 143
    assert happens(lambda: not Path("/proc", pid.read_text().strip()).exists(), within_s=10)


def happens(fact, within_s):
    end = time.monotonic() + within_s
    while not fact() and time.monotonic() < end:
        time.sleep(0.05)
    return fact()
