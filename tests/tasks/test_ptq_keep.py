"""`ptq=keep`: a search over the scales of nets that are quantized already, by training or by calibration.

Oracles: the file's own tensors, the float nets' logits, and the fitness that the search before ended with.
"""

import pytest
import torch

import qat
from qat.data import Digits
from qat.ptq.search import SearchSettings
from qat.tasks.ptq import ptq
from qat.tasks.ptq_start import calibration_batches
from qat.tasks.subject import build_evaluated_net
from qat.utils.files import csv_rows
from tests.callbacks.fitting import differing
from tests.conftest import compose, evaluate, results, train
from tests.ptq.searching import whole_fitness
from tests.tasks.test_evaluate import DIGITS, counted, last
from tests.tasks.test_ptq import SMALL, quantize

EVOLUTION = "search=evolution search.passes=2 search.radius=0.1 search.relative=true"
SEARCH = EVOLUTION.split()
KEEP = ("ptq=keep", *SEARCH, *SMALL)
ACTIVATIONS = "search.targets=[attn.input,attn.proj.input,mlp.*.input]"


@pytest.fixture(scope="module")
def lsq_run(tmp_path_factory, float_run):
    """Three bits, a stored scale for every weight, trained from the float net."""
    return train(
        tmp_path_factory.mktemp("lsq") / "run", "quant=lsq_3bit", f"ckpt={last(float_run)}"
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, float_run):
    """Three bits by OMSE, and a first search on it."""
    folder = tmp_path_factory.mktemp("calibrated")
    quantize(folder, f"ckpt={last(float_run)}", "ptq=omse_w3a8", *SEARCH, *SMALL)
    return folder


def tensors(path):
    return torch.load(path, weights_only=True)["state_dict"]


def changed(one, two):
    """Names of tensors that two files have different."""
    one, two = (
        {
            name.removeprefix("net."): t
            for name, t in tensors(path).items()
            if not name.startswith("teacher")
        }
        for path in (one, two)
    )
    return set(differing(one, two))


def fitnesses(folder):
    rows = csv_rows(folder / "search.csv")
    return [float(row["fitness"]) for row in rows if row["accepted"] == "1"]


def test_a_net_trained_with_lsq_gets_other_weight_scales_and_nothing_else(
    tmp_path, lsq_run, float_run
):
    found = quantize(tmp_path, *KEEP, f"ckpt={last(lsq_run)}", f"teacher.ckpt={last(float_run)}")
    names = changed(last(lsq_run), tmp_path / "quantized.ckpt")
    assert {name.rpartition(".")[0] for name in names} <= {
        f"blocks.0.attn.{layer}.weight_quantizer" for layer in ("qkv", "proj")
    }
    assert found["search"]["fitness"] < found["search"]["fitness_before"]
    net = qat.load(tmp_path / "quantized.ckpt")
    assert found["top1"] == pytest.approx(counted(net, Digits(**DIGITS))[0])
    assert (found["quant"], found["calibration"]) == ("lsq_3bit", None)
    assert found["top1_fp"] == pytest.approx(
        evaluate(tmp_path / "fp", f"ckpt={last(float_run)}")["top1"]
    )
    assert found["top1_start"] == pytest.approx(
        evaluate(tmp_path / "start", f"ckpt={last(lsq_run)}")["top1"]
    )


def test_its_targets_are_the_teachers_logits(tmp_path, lsq_run, float_run):
    """The fitness of the file, measured here with plain forwards on the same images and the float net's own logits."""
    cfg = compose(
        "ptq",
        *KEEP,
        f"ckpt={last(lsq_run)}",
        f"teacher.ckpt={last(float_run)}",
        f"run_dir={tmp_path}",
    )
    batches = calibration_batches(build_evaluated_net(cfg).data, cfg.ptq.batch)
    ptq(cfg)
    teacher = qat.load(last(float_run)).eval()
    with torch.no_grad():
        targets = [teacher(batch) for batch in batches]
    fitness = whole_fitness(
        qat.load(tmp_path / "quantized.ckpt").eval(), batches, targets, SearchSettings()
    )
    assert fitness == pytest.approx(results(tmp_path)["search"]["fitness"], rel=1e-6)


@pytest.mark.long
def test_a_net_with_statsq_weights_has_scales_of_activations(
    tmp_path, run_4bit, float_run, refused
):
    start = (*KEEP, f"ckpt={last(run_4bit)}", f"teacher.ckpt={last(float_run)}")
    line = refused(compose("ptq", *start, f"run_dir={tmp_path}/refused"))
    assert (
        "search.targets=['attn*.*.weight', 'attention.*.weight', 'self_attn.*.weight', 'attn*.qk']: must match a scale of a block; stored scales are those of attn.input, "
        in line
    )
    found = quantize(tmp_path / "run", *start, ACTIVATIONS)
    names = changed(last(run_4bit), tmp_path / "run" / "quantized.ckpt")
    assert names
    assert all(
        name.startswith("blocks.0.")
        and ".input_quantizer.quantizer." in name
        and "offset" not in name
        for name in names
    )
    assert found["search"]["fitness"] < found["search"]["fitness_before"]


@pytest.mark.long
def test_a_search_goes_on_where_another_ended(tmp_path, calibrated):
    """The same calibration images and, in float, the same net: the second search begins with the fitness of the first."""
    path = calibrated / "quantized.ckpt"
    found = quantize(
        tmp_path, *KEEP, f"ckpt={path}", "search.seed=5", "search.targets=[mlp.*.weight]"
    )
    assert found["search"]["fitness_before"] == results(calibrated)["search"]["fitness"]
    assert fitnesses(tmp_path) == sorted(fitnesses(tmp_path), reverse=True)
    assert changed(path, tmp_path / "quantized.ckpt") <= {
        f"blocks.0.mlp.fc{n}.weight_quantizer.scale" for n in (1, 2)
    }
    assert found["top1_fp"] == pytest.approx(results(calibrated)["top1_fp"])
    assert found["quant"] == "omse_w3a8"


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("start", "typed", "message"),
    [
        (
            "float",
            f"ptq=keep {EVOLUTION}",
            "ptq=keep: the model is in float; must be a recipe of conf/ptq",
        ),
        (
            "lsq",
            "ptq=keep",
            "ptq=keep: there is nothing to do; add a search over the scales, e.g. search=evolution",
        ),
        (
            "lsq",
            f"ptq=keep {EVOLUTION}",
            "contains a quantized model whose weights were trained (lsq), so it has no float logits as targets; set teacher.ckpt=FILE",
        ),
        (
            "lsq",
            f"ptq=keep {EVOLUTION} +ptq.bits=8",
            "ptq.bits: ptq=keep keeps the model's quantizers and accepts only ptq.batch",
        ),
        (
            "lsq",
            f"ptq=keep {EVOLUTION} teacher.ckpt={{lsq}}",
            "is quantized; must be a float model, whose logits are the targets of the search",
        ),
        (
            "lsq",
            f"ptq=keep {EVOLUTION} teacher.ckpt=nowhere.ckpt",
            "teacher.ckpt='nowhere.ckpt': no such file",
        ),
        (
            "lsq",
            EVOLUTION,
            "is quantized already (lsq); must be a float model; ptq=keep search=evolution accepts",
        ),
        (
            "float",
            f"{EVOLUTION} teacher.ckpt={{float}}",
            "only with ptq=keep; otherwise the targets are the logits of the float model itself",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, refused, float_run, lsq_run, start, typed, message):
    paths = {"float": last(float_run), "lsq": last(lsq_run)}
    given = (f"run_dir={tmp_path}", f"ckpt={paths[start]}", *typed.format(**paths).split(), *SMALL)
    assert message in refused(compose("ptq", *given))
