"""The table over several runs. Oracle: hand-made results."""

import io
import json

import pytest
from rich.console import Console

import qat
from qat.report.__main__ import compare, main


def write(folder, **values):
    folder.mkdir(parents=True)
    base = {
        "command": "train",
        "quant": "fp",
        "recipe": None,
        "seed": 0,
        "weights": "best.ckpt",
        "top1": 90.0,
        "top5": 99.0,
        "size_bytes": 1234567,
    }
    (folder / "results.json").write_text(json.dumps(base | values))
    return folder


def text(*run_dirs):
    out = io.StringIO()
    Console(width=200, file=out).print(compare([str(one) for one in run_dirs]))
    return out.getvalue()


def test_one_row_a_run(tmp_path):
    ofq = {
        "quant": "ofq_2bit",
        "recipe": qat.recipe("ofq", bits=2, act_bits=3).to_dict(),
        "top1": 88.125,
        "command": "eval",
        "weights": "a/best.ckpt",
    }
    shown = text(write(tmp_path / "fp"), write(tmp_path / "q", **ofq))
    first, second = (next(line for line in shown.splitlines() if f" {name} " in line) for name in ("fp", "ofq_2bit"))
    assert "W32 A32" in first
    assert "1,234,567" in first
    assert str(tmp_path / "fp") in first
    for part in ("W2 A3", "88.12", "a/best.ckpt"):
        assert part in second


def test_seeds_of_a_run_share_a_row(tmp_path):
    runs = [write(tmp_path / f"seed{s}" / "fp", seed=s, top1=top1) for s, top1 in enumerate((90.0, 92.0, 94.0))]
    shown = text(*runs)
    assert "92.00 ± 2.00" in shown
    assert "fp (3 seeds: 0, 1, 2)" in shown


def test_other_nets_and_the_same_seed_again_are_other_rows(tmp_path):
    nets = [write(tmp_path / name / "eval", model=name, top1=top1) for name, top1 in (("deit_tiny", 70.0), ("deit_small", 80.0))]
    again = write(tmp_path / "again" / "eval", model="deit_tiny", top1=60.0)
    other = write(tmp_path / "other" / "eval", model="deit_tiny", top1=50.0, data="cifar10", seed=1)
    shown = text(*nets, again, other)
    assert "±" not in shown
    assert all(f" {top1}.00 " in shown for top1 in (80, 70, 60, 50))


def test_a_failed_run_has_dashes(tmp_path):
    assert text(write(tmp_path / "a", top1=None, top5=None, size_bytes=None)).count(" – ") == 3


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(qat.UsageError, match="nowhere/results.json: no results there"):
        compare([str(tmp_path / "nowhere")])


def test_command(tmp_path, capsys):
    assert main([str(write(tmp_path / "fp"))]) == 0
    assert "90.00" in capsys.readouterr().out
    assert main([]) == 2
    assert main([str(tmp_path / "no")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / 'no'}")
    assert "no results there" in line
