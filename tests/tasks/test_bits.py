"""`search=bits` of `ptq.py` from end to end. Oracle: `qat.load` of what it wrote, and nets converted with the rules that it printed."""

import csv
import dataclasses
import json
import shutil

import pytest
import torch

import qat
from qat.model.cost import size_bytes
from qat.ptq.bits_settings import BitsSettings
from qat.tasks import build
from qat.tasks.bits import hydra_text
from qat.tasks.ptq import build_ptq_recipe
from qat.tasks.search import build_search
from tests.conftest import compose, evaluate, results, tiny
from tests.ptq.bit_nets import bits_of
from tests.tasks.test_evaluate import last

SMALL = ("data.calibration_images=20", "ptq.batch=10", "search.generations=2", "search.children=2", "search.choices=[2,4,8]")
BUDGET = ("search=bits", "search.average_bits=3.5")


def quantize(run_dir, *overrides):
    from qat.tasks.ptq import ptq as task

    task(compose("ptq", f"run_dir={run_dir}", *overrides))
    return results(run_dir)


@pytest.fixture(scope="module")
def searched(tmp_path_factory, float_run):
    """A run whose weights have different bits."""
    run = tmp_path_factory.mktemp("bits") / "run"
    quantize(run, f"ckpt={last(float_run)}", *BUDGET, *SMALL, "search.front_points=3", "search.fitness=mse")
    return run


def test_a_file_has_all_settings_at_their_defaults():
    cfg = compose("ptq", *BUDGET, "seed=3", "run_dir=a")
    assert set(cfg.search) == {field.name for field in dataclasses.fields(BitsSettings)}
    assert build_search(cfg) == BitsSettings(average_bits=3.5, seed=3)


def test_what_a_run_leaves_behind(searched):
    found, net = results(searched), qat.load(searched / "quantized.ckpt")
    search = found["search"]
    assert {p.name for p in searched.iterdir()} >= {
        *("search.csv", "search.ckpt", "front.csv", "front.json", "front.svg", "front.png", "overrides.txt", "conversion.txt")
    }
    assert (search["method"], search["selected_on"]) == ("bits", "calibration")
    assert search["bits"] == bits_of(net)
    assert len(set(bits_of(net).values())) > 1
    assert size_bytes(net) == search["size_bytes"] == found["size_bytes"] <= search["budget_bytes"]
    assert search["average_bits"] <= 3.5
    assert found["recipe"]["overrides"] == {name: {"bits": bits} for name, bits in bits_of(net).items()}
    rows = [line.split() for line in (searched / "conversion.txt").read_text().splitlines()]
    assert all([name, "weight", "affine", str(bits), "0"] in [row[:5] for row in rows] for name, bits in bits_of(net).items())


def test_the_front_and_its_accuracies(searched):
    found, report = results(searched), json.loads((searched / "front.json").read_text())
    with (searched / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    points = report["points"]
    assert (report["split"], report["selected_on"]) == ("test", "calibration")
    assert [int(row["size_bytes"]) for row in rows] == [p["size_bytes"] for p in points] == sorted(p["size_bytes"] for p in points)
    assert [float(row["fitness"]) for row in rows] == sorted((p["fitness"] for p in points), reverse=True)
    assert [row["bits"] for row in rows] == [" ".join(str(p["bits"][name]) for name in report["layers"]) for p in points]
    (selected,) = [p for p in points if p["selected"]]
    assert (selected["top1"], selected["bits"]) == (found["top1"], found["search"]["bits"])
    assert sum(p["top1"] is not None for p in points) == min(3, len(points))
    assert sum(row["top1"] != "" for row in rows) == min(3, len(points))


def test_eval_gives_the_same_numbers(tmp_path, searched):
    again, found = evaluate(tmp_path, f"ckpt={searched}/quantized.ckpt"), results(searched)
    for key in ("top1", "loss", "size_bytes", "bitops", "recipe"):
        assert again[key] == found[key], key


def test_the_rules_that_it_writes_can_be_typed(tmp_path, searched, float_run):
    """Calibrated with them, the float net becomes the net that was found, to the last bit."""
    rules = (searched / "overrides.txt").read_text().strip()
    assert build_ptq_recipe(compose("ptq", f"ptq.overrides={rules}", "run_dir=a")).overrides == results(searched)["recipe"]["overrides"]
    quantize(tmp_path / "again", f"ckpt={last(float_run)}", f"ptq.overrides={rules}", *SMALL[:2])
    one, two = (torch.load(run / "quantized.ckpt", weights_only=True)["state_dict"] for run in (tmp_path / "again", searched))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_search_over_scales_goes_on_from_them(tmp_path, searched, float_run):
    rules = (searched / "overrides.txt").read_text().strip()
    scales = ("search=evolution", "search.passes=1", "search.cycles=1")
    quantize(tmp_path, f"ckpt={last(float_run)}", f"ptq.overrides={rules}", *scales, *SMALL[:2])
    assert bits_of(qat.load(tmp_path / "quantized.ckpt")) == results(searched)["search"]["bits"]


def test_training_goes_on_from_them(tmp_path, searched):
    rules = (searched / "overrides.txt").read_text().strip()
    cfg = tiny(tmp_path, "quant=ofq_noqkr_2bit", f"quant.overrides={rules}", f"ckpt={searched}/quantized.ckpt")
    start = build.build_start(cfg)
    qat.convert(start.net, build.build_recipe(cfg), input_size=(1, 8, 8))
    assert bits_of(start.net) == results(searched)["search"]["bits"]
    acts = {s.quantizer.spec.bits for s in qat.iter_quantizers(start.net) if not s.is_weight and s.name.startswith("blocks")}
    assert acts == {2}


def test_rules_of_the_recipe_are_kept(tmp_path, float_run):
    mine = (
        "ptq.overrides={head:{act_bits:6,bits:8},blocks.*.fc1:{bias_correction:true}}",
        "search.targets=[blocks.*]",
        "search.front_points=0",
    )
    quantize(tmp_path, f"ckpt={last(float_run)}", *BUDGET, *SMALL, *mine)
    rules = (tmp_path / "overrides.txt").read_text().strip()
    assert rules.startswith("{head:{act_bits:6,bits:8},blocks.*.fc1:{bias_correction:true},blocks.0.attn.qkv:{bits:")
    net = qat.load(tmp_path / "quantized.ckpt")
    assert bits_of(net)["head"] == 8
    specs = {site.name: site.quantizer.spec for site in qat.iter_quantizers(net)}
    assert specs["head.input_quantizer"].bits == 6
    assert specs["blocks.0.mlp.fc1.weight_quantizer"].bias_correction
    assert json.loads((tmp_path / "front.json").read_text())["points"][0]["top1"] is None


def test_overrides_as_text():
    assert hydra_text({"a.*": {"bits": 3, "act_bits": None, "bias_correction": True}, "b": {}}) == (
        "{a.*:{bits:3,act_bits:null,bias_correction:true},b:{}}"
    )


def test_a_finished_search_is_resumed_to_the_same_net(tmp_path, searched, float_run):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(searched / "search.ckpt", run)
    shutil.copy(searched / "search.csv", run)
    start = (f"ckpt={last(float_run)}", *BUDGET, *SMALL, "search.front_points=3", "search.fitness=mse")
    found = quantize(run, *start, "resume=auto")
    assert found["search"] == results(searched)["search"]
    assert (run / "search.csv").read_text() == (searched / "search.csv").read_text()
    assert (run / "front.csv").read_text() == (searched / "front.csv").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "search.budget_mb=None, search.average_bits=None: one of them is needed, and only one: the size that the net may have"),
        (("search.budget_mb=0.001",), "search.budget_mb=0.001: the net takes "),
        (("search.average_bits=1",), "search.average_bits=1: must be a number of at least 2"),
        (("search.average_bits=3", "search.choices=[2,16]"), "search.choices=16: must be an integer from 2 to 8"),
        (("search.average_bits=3", "search.targets=[nope]"), "search.targets=['nope']: no such module has a weight whose bits can change"),
        (("search.average_bits=3", "+search.passes=3"), "search.passes: must be one of method, budget_mb, average_bits, choices"),
        (("search.average_bits=3", "ptq.batch=1"), "search.fitness='infonce': a batch of one image has no others"),
        (("search.average_bits=3", "ptq.weight_quantizer=float", "ptq.bits=8"), "whose bits can change; those are nothing"),
    ],
)
def test_mistakes_are_one_line(tmp_path, float_run, refused, overrides, message):
    line = refused("ptq", compose("ptq", f"run_dir={tmp_path}", f"ckpt={last(float_run)}", "search=bits", *SMALL[:2], *overrides))
    assert message in line
    assert not (tmp_path / "quantized.ckpt").exists()


def test_a_quantized_checkpoint_is_refused(tmp_path, refused, searched):
    line = refused("ptq", compose("ptq", f"run_dir={tmp_path}", f"ckpt={searched}/quantized.ckpt", *BUDGET))
    assert "is quantized already" in line
