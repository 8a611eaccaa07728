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


def suggested(folder, ckpt, budget):
    """Setting as it is printed, and what the results say of it."""
    command = (
        "analysis=sensitivity",
        "analysis.bits=[2,8]",
        f"analysis.budget_mb={budget}",
        "images=40",
        "split=val",
    )
    code, out = typed("analyze.py", f"ckpt={ckpt}", f"run_dir={folder}/run", *command, cwd=folder)
    assert code == 0, out
    (line,) = [line for line in out.splitlines() if ".overrides={" in line]
    (summary,) = [
        entry for entry in results(folder / "run")["summary"].values() if "suggestion" in entry
    ]
    (argument,) = shlex.split(line.strip())
    assert argument == summary["suggestion"]["setting"]
    return argument, summary["suggestion"]


@pytest.mark.long
def test_bits_for_training_can_be_typed(tmp_path, run_4bit):
    argument, entry = suggested(tmp_path, last(run_4bit), 0.011)
    again = train(tmp_path / "again", "quant=ofq_4bit", argument, f"ckpt={last(run_4bit)}")
    found = weight_bits(last(again))
    assert {name: found[name] for name in entry["bits_of_layers"]} == entry["bits_of_layers"]
    assert len(set(entry["bits_of_layers"].values())) > 1
    assert (found["head"], found["patch_embed.proj"]) == (8, 8)
    assert results(again)["size_bytes"] == entry["size_bytes"]
