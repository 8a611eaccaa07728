"""The term and its settings. Oracles: the formula on each layer, runs that come out the same, one-line errors."""

import csv
import re

import pytest
import timm
import torch
from torch.testing import assert_close

from qat.functional import kure_loss, kurtosis
from qat.losses import Kure
from qat.losses.weights import latent_weights
from tests.conftest import tiny, train
from tests.errors import usage_error
from tests.losses.common import step
from tests.tiny import quantized, vit


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr", "lsq", "minmax"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_the_term_is_the_loss_of_the_float_masters(preset, reduction):
    net = quantized(preset, bits=2)
    term = Kure(target=2.5, reduction=reduction)
    weights = latent_weights(net)
    assert_close(term(step(net)), kure_loss(weights, 2.5, reduction))
    expected = torch.stack([kurtosis(w) for w in weights]).detach()
    watched = {f"kurtosis_{name}": getattr(expected, name)() for name in ("mean", "min", "max")}
    assert_close(term.logged_values, watched)
    assert not any(value.requires_grad for value in term.logged_values.values())


def test_deviates_from_reference_both_factors_of_the_product_are_pulled():
    net = quantized("ofq")
    Kure()(step(net)).backward()
    moved = [
        name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    ]
    assert {f"blocks.{i}.attn.{f}_weight" for i in (0, 1) for f in "qk"} < set(moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_same_under_autocast(dtype):
    net = quantized("ofq")
    plain = Kure()(step(net))
    with torch.autocast("cpu", dtype):
        assert torch.equal(Kure()(step(net)), plain)


@pytest.mark.parametrize(
    "setting", ["loss.kure=-1", "loss.kure_target=1", "loss.kure_reduction=avg"]
)
def test_impossible_settings(tmp_path, refused, setting):
    name, value = setting.split("=")
    message = refused(tiny(tmp_path / "run", setting))
    assert re.search(f"{name}='?{value}'?: must be ", message)


def test_a_run_logs_the_kurtoses(tmp_path):
    run = train(
        tmp_path / "run", "loss.kure=1", "trainer.log_every_n_steps=1", "callbacks=[default,ema]"
    )
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    logged = [float(row["train/kurtosis_mean"]) for row in rows if row["train/kurtosis_mean"]]
    assert len(logged) == 2
    assert all(1.5 < value < 4 for value in logged)
    assert any(row["train/loss_kure"] for row in rows)


LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
QKR = ("attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize(
    ("preset", "layers"),
    [("fp", LAYERS), ("lsq", LAYERS), ("ofq_noqkr", LAYERS), ("minmax", LAYERS), ("ofq", QKR)],
)
def test_deviates_from_reference_kure_counts_the_layers_that_are_there(preset, layers):
    # There the mean divides by a number fixed for each of three networks; Linears are no layers.
    net = vit() if preset == "fp" else quantized(preset)
    modules = dict(net.named_modules())
    expected = [modules[f"blocks.{block}.{layer}"].weight for block in (0, 1) for layer in layers]
    found = latent_weights(net)
    assert {id(w) for w in found if w.is_leaf} == {id(w) for w in expected}
    folded = [w for w in found if not w.is_leaf]
    matrices = [block.attn.latent("qk") for block in net.blocks] if preset == "ofq" else []
    assert [w.shape for w in folded] == [m.shape for m in matrices]


def test_a_weight_that_is_there_twice_counts_once():
    net = vit()
    net.blocks[1].mlp = net.blocks[0].mlp
    assert len(latent_weights(net)) == 6
    net = vit()
    net.blocks[1].mlp.fc1.weight = net.blocks[0].mlp.fc1.weight
    assert len(latent_weights(net)) == 7


def test_convolutions_of_a_net_are_found_but_the_first():
    found = latent_weights(timm.create_model("resnet18", num_classes=10))
    assert len(found) == 19  # of 20; the paper's code regularizes as many
    assert all(weight.ndim == 4 for weight in found)


def test_nothing_to_act_on():
    with usage_error("^loss.kure: "):
        Kure().prepare(torch.nn.Sequential(torch.nn.LayerNorm(3)))
