"""`analyze.py analysis=weights | cost | oscillation`. Oracle: `qat.model.cost` of the file, the layers of its net, the lines of errors."""

import csv
import json

import pytest

import qat
from qat.model.cost import cost
from tests.conftest import compose, results


def analyze(run_dir, *overrides):
    """Analyse; gives the index of the outcome back."""
    from qat.tasks.analyze import analyze as task

    cfg = compose("analyze", f"run_dir={run_dir}", *overrides)
    task(cfg)
    return json.loads((run_dir / f"{results(run_dir)['analysis']}.json").read_text())


def ckpt(run):
    return f"ckpt={run}/checkpoints/last.ckpt"


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_weights_with_a_few_images(tmp_path, run_4bit):
    index = analyze(tmp_path, ckpt(run_4bit), "analysis=weights", "analysis.activation_images=8", "images=8")
    net = qat.load(run_4bit / "checkpoints" / "last.ckpt")
    sites = [s for s in qat.iter_quantizers(net) if s.is_weight]
    assert [row["layer"] for row in read(tmp_path / "weights.csv")] == [s.name.rpartition(".")[0] for s in sites]
    activations = read(tmp_path / "weights_activations.csv")
    assert {row["quantizer of"] for row in activations} == {s.name for s in qat.iter_quantizers(net) if not s.is_weight}
    assert all(row["clipped, %"] for row in activations)
    assert index["complete"]
    assert results(tmp_path)["split"] == "train"


def test_weights_without_images(tmp_path, run_4bit):
    analyze(tmp_path, ckpt(run_4bit), "analysis=weights", "analysis.activation_images=0", "data.root=/nowhere")
    assert {row["quantizer"] for row in read(tmp_path / "weights_activations.csv")} == {"lsq"}
    assert results(tmp_path)["split"] is None


def test_cost_is_that_of_the_results(tmp_path, run_4bit, float_run):
    index = analyze(tmp_path, f"ckpt=[{run_4bit}/checkpoints/last.ckpt,{float_run}/checkpoints/last.ckpt]", "analysis=cost")
    label = next(iter(index["summary"]))  # that of the first file
    found = cost(qat.load(run_4bit / "checkpoints" / "last.ckpt"), (1, 8, 8))
    assert index["summary"][label]["size_bytes"] == found.size_bytes == results(run_4bit)["size_bytes"]
    assert index["summary"][label]["bitops"] == found.bitops == results(run_4bit)["bitops"]
    assert sum(int(row["bytes"]) for row in read(tmp_path / "cost_modules.csv") if row["net"] == label) == found.size_bytes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["analysis=oscillation"], "its run tracked no oscillation; train with callbacks=[default,oscillation], in the same run_dir"),
        (["analysis=weights", "analysis.layers=[nothing]", "images=8"], "analysis.layers: 'nothing' matches no layer with weights"),
        (
            ["analysis=weights", "ckpt={frozen}", "data=digits", "images=8"],
            "holds integer codes alone; the float weights are in",
        ),
        (["analysis=cost", "+analysis.twins=2"], "analysis.twins: must be absent, cost has no settings"),
    ],
)
def test_mistakes_are_one_line_and_leave_an_older_run_as_it_was(tmp_path, run_4bit, refused, overrides, message):
    older = {name: tmp_path / name for name in ("config.yaml", "command.json", "results.json", "points.jsonl")}
    for path in older.values():
        path.write_text("{}\n")
    frozen = tmp_path / "frozen.ckpt"
    qat.save(qat.freeze(qat.load(run_4bit / "checkpoints" / "last.ckpt")), frozen)
    overrides = [one.format(frozen=frozen) for one in overrides]
    chosen = [] if any(one.startswith("ckpt=") for one in overrides) else [ckpt(run_4bit)]
    assert message in refused("analyze", compose("analyze", f"run_dir={tmp_path}", "resume=false", *chosen, *overrides))
    assert {path.read_text() for path in older.values()} == {"{}\n"}
