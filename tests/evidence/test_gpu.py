"""`python -m evidence.gpu` without a GPU: all but the numbers. Oracles: closed forms; for a run that was killed, one that was not."""

import argparse
import math
import os
import time

import pytest

from evidence.gpu import rows, speed, train
from qat.utils.files import read_torch
from tests.commands import run_python
from tests.tiny import identical

ABSENT = ("hydra", "omegaconf", "lightning", "pytorch_lightning")


@pytest.mark.long
def test_dry_runs_without_hydra_and_lightning(tmp_path):
    code = f"import runpy, sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    for arguments in ([], ["--train", str(tmp_path)]):
        code += f"sys.argv = ['', '--dry-run', *{arguments}]\nrunpy.run_module('evidence.gpu', run_name='__main__')\n"
    done = run_python("-c", code, timeout=240, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    measured, trained = (
        rows.read(next(tmp_path.rglob(f"{kind}.jsonl"))) for kind in ("measured", "train")
    )
    assert [row for row in measured + trained if "failed" in row] == []
    assert {row["name"] for row in measured} == {"machine"} | {
        v.name for group in speed.groups(list(speed.MODELS), dry_run=True) for v in group
    }
    assert {row["variant"] for row in trained if "test" in row} == set(train.VARIANTS)
    assert "w2a2 statsq qkr - w2a2 statsq" in done.stdout


def settings(folder, **changes):
    train.prepare(folder, folder / "cifar10.pt", dry_run=True)
    made = {
        "out": folder / "train.jsonl",
        "epochs": 3,
        "float_epochs": 2,
        "batch": 8,
        "dry_run": True,
    }
    return argparse.Namespace(**made | changes)


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole, parts = (settings(tmp_path / name) for name in ("whole", "parts"))
    wanted = [train.Run(train.FLOAT, 0), train.Run(train.QKR, 0)]
    expected = [train.train(run, whole, math.inf) for run in wanted]

    def killed_after_each_epoch(path, row):
        rows.append(path, row)
        if "epoch" in row:
            raise Killed

    monkeypatch.setattr(train, "append", killed_after_each_epoch)
    for run, row in zip(wanted, expected, strict=True):
        for _ in range(2 if run.variant == train.FLOAT else 3):
            with pytest.raises(Killed):
                train.train(run, parts, math.inf)
        assert train.train(run, parts, math.inf) == row
        nets = [read_torch(run.file(args.out, "best")) for args in (whole, parts)]
        assert identical(nets[0], nets[1])


def test_runs_end_in_time_and_one_that_failed_is_recorded(tmp_path, monkeypatch):
    args, wanted = settings(tmp_path), train.runs(dry_run=True)[:2]
    assert train.train_all(wanted, args, time.monotonic()) == wanted
    assert train.train(wanted[0], args, time.monotonic() - 1) == {"stopped": 0}
    monkeypatch.setattr(train, "one_epoch", lambda *_: 1 / 0)
    assert train.train_all(wanted, args, time.monotonic() + 600) == wanted[1:]
    (row,) = rows.read(args.out)
    assert row["failed"] == "ZeroDivisionError: division by zero"


def test_what_fails_in_a_process_is_a_row_and_ends_nothing():
    workers = [rows.Worker() for _ in range(3)]
    asked = [
        worker.send(*call)
        for worker, call in zip(workers, [(int, "x"), (os._exit, 3), (time.sleep, 60)], strict=True)
    ]
    found = [
        rows.result_of(one, time.monotonic() + 60 * (number < 2))["failed"]
        for number, one in enumerate(asked)
    ]
    rows.end_all()
    assert found[0] == "ValueError: invalid literal for int() with base 10: 'x'"
    assert "terminated abruptly" in found[1]
    assert found[2] == rows.LATE


def test_busy_time_counts_overlaps_once_and_rows_are_ratios_of_rounds():
    given = [
        ("kernel", 0, 2000),
        ("kernel", 1000, 2000),
        ("gpu_memcpy", 10000, 1000),
        ("gpu_user_annotation", 0, 99999),
    ]
    events = [
        {"cat": kind, "name": kind, "ts": start, "dur": length} for kind, start, length in given
    ]
    assert speed.busy(events, 2) == {
        "busy_ms": 2.0,
        "kernels": 1.5,
        "longest": [("kernel", 2.0), ("gpu_memcpy", 0.5)],
    }
    row = {"host_ms": [1.0], "peak": [5], "busy_ms": 1.5, "kernels": 9.0}
    text = speed.report([
        {"name": "net, 8, float, eager", "ms": [1.0, 2.0]} | row,
        {"name": "net, 8, ofq, eager", "ms": [2.0, 6.0]} | row,
    ])
    assert (
        "| ofq | eager | 4.00 | 2.50 [2.00, 3.00] | | 2000 | 1.00 | 0.38 | 9 | 0.00 | 1.00 |"
        in text
    )
