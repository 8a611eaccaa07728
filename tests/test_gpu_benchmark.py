"""`python -m benchmarks.gpu` without a GPU: all but the numbers. Oracle: closed forms; for a run that was killed, one that was not."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import checks, cifar, job, plan, records, report, steps, summary, train
from benchmarks.gpu.children import LATE, Child
from benchmarks.gpu.clock import summed
from qat.utils.files import read_torch
from tests.conftest import ROOT, write_cifar

ABSENT = ("hydra", "omegaconf", "lightning", "pytorch_lightning")


@pytest.mark.slow
def test_dry_runs_without_hydra_and_lightning(tmp_path):
    code = f"import runpy, sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    for arguments in ([], ["--train", str(tmp_path)]):
        code += f"sys.argv = ['', '--dry-run', *{arguments}]\nrunpy.run_module('benchmarks.gpu', run_name='__main__')\n"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    measured, trained = (records.read(next(tmp_path.rglob(f"{kind}.jsonl"))) for kind in ("measured", "train"))
    assert [row for row in measured + trained if "failed" in row] == []
    assert {row["name"].partition(", ")[0] for row in measured} == {"check", "step", "machine", "kernel", "products"}
    assert all(row["right"] for row in measured if row["name"].startswith("check"))
    assert all(row["kernel_right"] for row in measured if row["name"].startswith("kernel"))
    assert {row["variant"] for row in trained if "test" in row} == {run.variant for run in plan.runs(dry_run=True)}
    assert "w2a2 statsq qkr cga - w2a2 statsq qkr" in done.stdout


def setting_of(folder):
    cifar.prepare(folder, folder / "cifar10.pt", dry_run=True)
    return job.Setting(folder / "train.jsonl", folder / "cifar10.pt", 3, 2, 8, True)


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    wanted = [run for run in plan.runs(dry_run=True) if run.variant in {"float", plan.QKR, plan.CGA}]
    whole, parts = (setting_of(tmp_path / name) for name in ("whole", "parts") if not (tmp_path / name).mkdir())
    expected = [job.Job(run, whole).train(math.inf) for run in wanted]

    def killed_behind_each_epoch(path, row):
        records.append(path, row)
        if "epoch" in row:
            raise Killed

    monkeypatch.setattr(job, "append", killed_behind_each_epoch)
    for run in wanted:
        kills, row = 0, None
        while row is None:
            try:
                row = job.Job(run, parts).train(math.inf)
            except Killed:
                kills += 1
        assert kills == {"float": 2, plan.QKR: 3, plan.CGA: 1}[run.variant]
        assert row == expected[wanted.index(run)]
        nets = [read_torch(setting.file(run.name, "best")) for setting in (whole, parts)]
        assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    rows = [{k: v for k, v in row.items() if k != "seconds"} for setting in (whole, parts) for row in records.read(setting.out)]
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]


def test_annealing_holds_what_is_not_near_a_threshold(tmp_path):
    setting = setting_of(tmp_path)
    by_variant = {run.variant: run for run in plan.runs(dry_run=True)}
    for variant in ("float", plan.QKR):
        job.Job(by_variant[variant], setting).train(math.inf)
    annealed = job.Job(by_variant[plan.CGA], setting)
    annealed._restored()
    before = {name: p.detach().clone() for name, p in annealed.net.named_parameters()}
    annealed._epoch(setting.annealed_from)
    moved = {name: (p != before[name]).float().mean().item() for name, p in annealed.net.named_parameters()}
    assert moved["blocks.0.mlp.fc1.weight"] < 0.1
    assert moved["blocks.0.attn.q_weight"] > 0.9
    assert {group["lr"] for group in annealed.optimizer.param_groups} == {job.CGA_LR}


def test_a_run_ends_in_time_and_its_crew_names_what_is_left(tmp_path, capsys):
    setting = setting_of(tmp_path)
    wanted = plan.runs(dry_run=True)[:2]
    assert train.Crew(wanted, setting, 2, time.monotonic()).work() == [run.name for run in wanted]
    assert job.Job(wanted[0], setting).train(time.monotonic() - 1) == {"stopped": 0}
    assert records.read(setting.out) == []


def test_a_failed_run_is_recorded_and_those_that_need_it_are_left(tmp_path, monkeypatch):
    setting = setting_of(tmp_path)
    monkeypatch.setattr(job.Job, "_epoch", lambda *_: math.nan)
    left = train.Crew(plan.runs(dry_run=True), setting, 2, math.inf).work()
    assert "w2a2 lsq seed0" in left
    (row,) = records.read(setting.out)
    assert row["failed"] == "FloatingPointError: the loss of epoch 0 is nan"
    assert "float seed0: FloatingPointError" in summary.text([row])


def test_all_arms_of_a_seed_come_before_the_next():
    found = [run.name for run in plan.runs(dry_run=False)]
    assert len(set(found)) == len(found) == 5 * 6 + 5 * 3 + 3 * 3
    assert max(found.index(f"{v} seed0") for v in ("w2a2 lsq", plan.QKR, plan.CGA)) < found.index("float seed1")
    assert {f"{one} seed{s}" for pair in plan.PAIRS for one in pair for s in range(5)} <= set(found)
    assert sum(name.startswith(f"{plan.QKR} seed") for name in found) == 8
    assert [run.needs for run in plan.runs(dry_run=True) if run.variant in {"float", plan.BASE, plan.CGA}] == [
        "",
        "float seed0",
        f"{plan.QKR} seed0",
    ]


def test_parquet_is_decoded_once(tmp_path):
    write_cifar(tmp_path, train=12, test=4)
    kept = tmp_path / "cifar10.pt"
    cifar.prepare(tmp_path, kept, dry_run=False)
    made = kept.stat().st_mtime_ns
    cifar.prepare(tmp_path / "gone", kept, dry_run=False)
    assert kept.stat().st_mtime_ns == made
    data = cifar.Cifar(kept, torch.device("cpu"))
    assert {name: tuple(images.shape) for name, (images, _) in data.parts.items()} == {
        "train": (9, 3, 32, 32),
        "val": (3, 3, 32, 32),
        "test": (4, 3, 32, 32),
    }
    everything = read_torch(kept)["train"][0]
    together = torch.cat([data.parts[name][0] for name in ("train", "val")])
    assert sorted(map(bytes, together.flatten(1).numpy())) == sorted(map(bytes, everything.flatten(1).numpy()))
    with pytest.raises(FileNotFoundError, match=r"must hold train\*.parquet"):
        cifar.prepare(tmp_path / "gone", tmp_path / "other.pt", dry_run=False)


def test_augmentation_flips_and_moves_whole_images():
    images = torch.arange(1.0, 1 + 256 * 3 * 16).view(256, 3, 4, 4)
    found = cifar.augmented(images, 1, torch.Generator().manual_seed(0))
    again = cifar.augmented(images, 1, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)
    seen = set()
    for image, moved in zip(images, found, strict=True):
        padded = [torch.nn.functional.pad(x, [1] * 4) for x in (image, image.flip(-1))]
        places = [(f, i, j) for f in (0, 1) for i in range(3) for j in range(3) if torch.equal(padded[f][:, i : i + 4, j : j + 4], moved)]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) == 18


def test_children_fail_by_themselves():
    children = {"fine": Child(dict), "raises": Child(int, "x"), "crashes": Child(os._exit, 3), "hangs": Child(time.sleep, 60)}
    for child in children.values():
        child.send("copy")
    until = time.monotonic() + 60
    found = {name: child.receive(until if name != "hangs" else 0) for name, child in children.items()}
    again = children["crashes"].receive(until)
    for child in children.values():
        child.close()
    assert found["fine"] == {}
    assert found["raises"]["failed"] == "ValueError: invalid literal for int() with base 10: 'x'"
    assert found["crashes"] == {"failed": "its process ended with exit code 3"}
    assert "had ended with exit code 3" in again["failed"]
    assert found["hangs"] == {"failed": LATE}


def test_children_end_with_their_parent():
    code = "import time; from benchmarks.gpu.children import Child; Child(time.sleep, 600).send('call'); raise SystemExit(4)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (4, "")


def test_records_survive_a_cut_and_keep_to_the_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a", "x": 1}\n{"name": "b", "x"')
    found = records.Records(path, 60)
    assert not found.wants("a")
    assert found.wants("b")
    assert not found.wants("c", needs=61)
    assert found.left == ["c"]
    found.add("b", {"failed": "why"})
    assert [json.loads(line) for line in path.read_text().splitlines() if not line.endswith('"x"')] == [
        {"name": "a", "x": 1},
        {"name": "b", "failed": "why"},
    ]
    assert not records.Records(path, 60).wants("b")


class Fake:
    """A process whose answers are given, by method; the last one stays."""

    def __init__(self, answers):
        self.answers, self.asked, self.closed = answers, [], False

    def send(self, method, *given):
        self.asked.append(method)

    def receive(self, until):
        answers = self.answers[self.asked[-1]]
        return dict(answers.pop(0) if len(answers) > 1 else answers[0])

    def close(self):
        self.closed = True


def test_a_group_goes_on_without_those_that_fail(tmp_path):
    turn = {"ms": 2.0, "host_ms": 1.0, "peak": 5}
    fine = {"prepare": [{"loss": 7.0}], "turn": [turn], "idleness": [{"busy_ms": 1.5, "kernels": 9.0}]}
    no_memory = {"failed": "OutOfMemoryError: CUDA out of memory"}
    fakes = {
        "float": Fake({**fine, "turn": [{**turn, "ms": 9.0}, {**turn, "ms": 1.0}]}),
        "linears": Fake({**fine, "prepare": [no_memory, {"loss": 7.0}]}),
        "ofq": Fake({**fine, "prepare": [{"failed": "InductorError: no"}]}),
        "ofq without qkr": Fake({**fine, "turn": [turn, {"failed": "its process ended with exit code -11"}]}),
    }
    found = records.Records(tmp_path / "rows.jsonl", 600)
    group = steps.Group(steps.variants(["net"], 8, fakes, "compiled"), found, lambda variant: fakes[variant.arm])
    group.finish(3, 1)
    rows = {name.split(", ")[3]: row for name, row in found.rows.items()}
    assert rows["linears"]["ms"] == [2.0, 2.0, 2.0]
    assert rows["linears"]["busy_ms"] == 1.5
    assert rows["ofq"]["failed"] == "InductorError: no"
    assert "turn" not in fakes["ofq"].asked
    assert rows["ofq without qkr"]["failed"] == "its process ended with exit code -11"
    assert all(fake.closed for fake in fakes.values())
    lines = {line.split(" | ")[0].strip("| "): line for line in report.text(found.rows).splitlines() if line.startswith("| ")}
    assert "| 2.00 | 2.00 [2.00, 2.00] | 2.00 [2.00, 2.00] | 4000 | 1.00 | 0.75 | 9 |" in lines["linears"]
    assert "InductorError: no" in lines["ofq"]
    assert steps.Group(steps.variants(["net"], 8, fakes, "compiled"), found, pytest.fail).members == {}


def test_a_group_whose_time_is_over_is_left_not_failed(tmp_path):
    found = records.Records(tmp_path / "rows.jsonl", 600)
    group = steps.Group(steps.variants(["net"], 8, ["float"], "eager"), found, lambda _: Fake({"prepare": [{"failed": LATE}]}))
    found.until = 0
    group.finish(3, 1)
    assert found.rows == {}
    assert found.left == ["step, net, 8, float, eager"]


def test_a_nan_is_never_right():
    one, none = {"logits": torch.ones(3)}, {"logits": torch.tensor([1.0, torch.nan, 1.0])}
    half = {"logits": torch.tensor([1.0, 1.0, 1.0005])}
    assert checks.Checks._judged(one, one, [one])["right"]
    for found, expected, control in ((none, one, one), (one, none, one), (one, one, none), (one, {"logits": torch.zeros(3)}, one)):
        assert not checks.Checks._judged(found, expected, [control])["right"]
        assert not checks.Checks._judged(found, expected, [control, half])["right"]
    away = {"logits": torch.tensor([1.0, 1.0, 1.001])}
    assert not checks.Checks._judged(away, one, [one])["right"]
    assert checks.Checks._judged(away, one, [one, half])["right"]


def test_busy_time_counts_overlaps_once():
    def event(start, length, name="a", kind="kernel"):
        return {"cat": kind, "ts": start, "dur": length, "name": name}

    events = [event(0, 2000), event(1000, 2000, "b"), event(10000, 1000, kind="gpu_memcpy"), event(0, 99999, kind="gpu_user_annotation")]
    assert summed(events, 2) == {"busy_ms": 2.0, "kernels": 1.5, "longest": [["a", 1.5], ["b", 1.0]]}


def test_intervals():
    assert summary.interval([1.0, 2.0, 3.0]) == "+2.00 ± 2.48"  # 4.303 / sqrt(3)
    rows = [
        {"variant": v, "seed": s, "test": 50.0 + 10 * s + up, "val": 1.0} for v, up in ((plan.QKR, 2.0), (plan.BASE, 0.0)) for s in range(3)
    ]
    text = summary.text([*rows, {"variant": plan.QKR, "seed": 3, "test": 0.0, "val": 0.0}])
    assert f"| {plan.QKR} - {plan.BASE} | 3 | +2.00 ± 0.00 | +0.00 ± 0.00 |" in text
    assert f"| {plan.BASE} | 3 | 60.00 ± 10.00 | 1.00 ± 0.00 |" in text
