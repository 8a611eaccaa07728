"""Sensitivity as a command: bits that are printed are typed back. Oracle: the checkpoints."""

import shlex

import pytest

import qat
from tests.commands import typed
from tests.conftest import results, train
from tests.tasks.test_evaluate import last


def weight_bits(path):
    return {
        site.layer: site.quantizer.spec.bits
        for site in qat.iter_quantizers(qat.load(path))
        if site.is_weight
    }


@pytest.mark.long
def test_bits_for_training_can_be_typed(tmp_path, run_4bit):
    ckpt = f"ckpt={last(run_4bit)}"
    command = ("analysis=sensitivity", "analysis.bits=[2,8]", "analysis.budget_mb=0.011")
    few = ("images=40", "split=val", "run_dir=run")
    code, out = typed("analyze.py", ckpt, *command, *few, cwd=tmp_path)
    assert code == 0, out
    (line,) = [line for line in out.splitlines() if ".overrides={" in line]
    summaries = results(tmp_path / "run")["summary"].values()
    (entry,) = [summary["suggestion"] for summary in summaries if "suggestion" in summary]
    (argument,) = shlex.split(line.strip())
    assert argument == entry["setting"]
    again = train(tmp_path / "again", "quant=ofq_4bit", argument, ckpt)
    found = weight_bits(last(again))
    assert {name: found[name] for name in entry["bits_of_layers"]} == entry["bits_of_layers"]
    assert len(set(entry["bits_of_layers"].values())) > 1
    assert (found["head"], found["patch_embed.proj"]) == (8, 8)
    assert results(again)["size_bytes"] == entry["size_bytes"]
