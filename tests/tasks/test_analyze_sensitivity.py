"""Sensitivity as a command: bits that are printed are typed back. Oracle: the checkpoints."""

import json
import shlex

import pytest

import qat
from tests.commands import typed
from tests.conftest import compose, results, train
from tests.tasks.test_evaluate import last
from tests.tasks.test_ptq import SMALL, quantize

SHORT = ("images=40", "split=val")
# Megabytes: between all weights at 2 bits and all at 8.
BUDGET, BUDGET_QAT = 0.008, 0.011


def analyze(run_dir, *overrides):
    """Analyse; gives the results back."""
    from qat.tasks.analyze import analyze as task

    task(compose("analyze", f"run_dir={run_dir}", *SHORT, *overrides))
    return results(run_dir)


def printed(text):
    """The settings between quotes in what a command prints."""
    return [line.strip() for line in text.splitlines() if ".overrides={" in line]


def weight_bits(path):
    return {site.name.rpartition(".")[0]: site.quantizer.spec.bits for site in qat.iter_quantizers(qat.load(path)) if site.is_weight}


@pytest.fixture(scope="module")
def ptq_run(tmp_path_factory, float_run):
    run = tmp_path_factory.mktemp("ptq") / "run"
    quantize(run, f"ckpt={last(float_run)}", "ptq=inputs_w4a8", *SMALL)
    return run


def suggested(folder, ckpt, budget):
    """Setting as it is printed, and what the results say of it."""
    command = ("analysis=sensitivity", "analysis.measures=[bits]", "analysis.bits=[2,8]", f"analysis.budget_mb={budget}")
    code, out = typed("analyze.py", f"ckpt={ckpt}", f"run_dir={folder}/run", *SHORT, *command, cwd=folder)
    assert code == 0, out
    (line,) = printed(out)
    (summary,) = [entry for entry in results(folder / "run")["summary"].values() if "suggestions" in entry]
    return line, summary["suggestions"][0]


@pytest.mark.long
def test_bits_for_training_can_be_typed(tmp_path, run_4bit):
    line, entry = suggested(tmp_path, last(run_4bit), BUDGET_QAT)
    (argument,) = shlex.split(line)
    assert argument == entry["setting"]
    again = train(tmp_path / "again", "quant=ofq_4bit", argument, f"ckpt={last(run_4bit)}")
    found = weight_bits(last(again))
    assert {name: found[name] for name in entry["bits_of_parts"]} == entry["bits_of_parts"]
    assert len(set(entry["bits_of_parts"].values())) > 1
    assert (found["head"], found["patch_embed.proj"]) == (8, 8)
    assert results(again)["size_bytes"] == entry["size_bytes"]


@pytest.mark.long
def test_bits_for_post_training_quantization_can_be_typed(tmp_path, float_run, ptq_run):
    line, entry = suggested(tmp_path, ptq_run / "quantized.ckpt", BUDGET)
    (argument,) = shlex.split(line)
    found = quantize(tmp_path / "again", f"ckpt={last(float_run)}", "ptq=inputs_w4a8", argument, *SMALL)
    assert weight_bits(tmp_path / "again" / "quantized.ckpt") == entry["bits_of_parts"]
    assert found["size_bytes"] == entry["size_bytes"]


@pytest.mark.long
def test_bits_of_a_float_net_are_for_ptq(tmp_path, float_run):
    line, entry = suggested(tmp_path, last(float_run), BUDGET)
    (argument,) = shlex.split(line)
    assert argument.startswith("ptq.overrides={")
    quantize(
        tmp_path / "again", f"ckpt={last(float_run)}", "ptq=inputs_w4a8", "ptq.act_quantizer=float", "ptq.attention=float", argument, *SMALL
    )
    assert weight_bits(tmp_path / "again" / "quantized.ckpt") == entry["bits_of_parts"]
    assert results(tmp_path / "again")["size_bytes"] == entry["size_bytes"]


def test_a_budget_that_is_too_small(tmp_path, refused, ptq_run):
    overrides = (f"ckpt={ptq_run}/quantized.ckpt", "analysis=sensitivity", "analysis.budget_mb=1e-3", *SHORT)
    line = refused("analyze", compose("analyze", f"run_dir={tmp_path}", *overrides))
    assert line.startswith("error: analysis.budget_mb=0.001: below the smallest possible size of quantized: 0.0")


def test_what_a_sensitivity_run_leaves(tmp_path, run_4bit):
    found = analyze(tmp_path, f"ckpt={last(run_4bit)}", "analysis=sensitivity", "analysis.bits=[2]", "analysis.by=block")
    assert (found["analysis"], found["split"]) == ("sensitivity", "val")
    index = json.loads((tmp_path / "sensitivity.json").read_text())
    assert [figure["file"] for figure in index["figures"]] == ["sensitivity.svg", "sensitivity_bits.svg"]
    for name in ("sensitivity.csv", "sensitivity.png", "sensitivity_bits.svg"):
        assert (tmp_path / name).stat().st_size > 200
