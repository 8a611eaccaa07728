"""The term and its settings. Oracles: the formula on each layer, runs that come out the same, one-line errors."""

import csv

import pytest
import timm
import torch
from torch.testing import assert_close

import qat
from qat.functional import kure_loss, kurtosis
from qat.losses import Kure, StepContext
from qat.losses.weights import latent_weights
from tests.conftest import tiny, train
from tests.tiny import quantized, sites, vit


def step(net):
    return StepContext(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), None, net)


def weights(net):
    outside = ("patch_embed.", "head.")
    return [
        site.latent()
        for name, site in sites(net).items()
        if site.is_weight and not name.startswith(outside)
    ]


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr", "lsq", "minmax"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_the_term_is_the_loss_of_the_float_masters(preset, reduction):
    net = quantized(preset, bits=2)
    term = Kure(target=2.5, reduction=reduction)
    assert_close(term(step(net)), kure_loss(weights(net), 2.5, reduction))
    expected = torch.stack([kurtosis(w) for w in weights(net)]).detach()
    assert_close(
        term.watched,
        {f"kurtosis_{name}": getattr(expected, name)() for name in ("mean", "min", "max")},
    )
    assert not any(value.requires_grad for value in term.watched.values())


def test_deviates_from_reference_both_factors_of_the_product_are_pulled():
    net = quantized("ofq")
    Kure()(step(net)).backward()
    moved = [
        name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    ]
    assert {f"blocks.{i}.attn.{f}_weight" for i in (0, 1) for f in "qk"} < set(moved)


@pytest.mark.parametrize("preset", ["fp", "ofq"])
def test_descending_it_brings_the_kurtosis_to_the_target(preset):
    net = vit() if preset == "fp" else quantized(preset, bits=2)
    term = Kure()
    term(step(net))
    assert term.watched["kurtosis_min"] > 2.5
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        term(step(net)).backward()
        optimizer.step()
    assert all(abs(term.watched[f"kurtosis_{name}"] - 1.8) < 0.1 for name in ("min", "max"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_it_is_the_same_under_autocast(precision):
    net = vit()
    plain = Kure()(step(net))
    with torch.autocast("cpu", torch.bfloat16 if precision == "bf16-mixed" else torch.float16):
        assert torch.equal(Kure()(step(net)), plain)
    quantised = quantized("ofq")
    plain = Kure()(step(quantised))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Kure()(step(quantised)), plain)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.kure=-1", "loss.kure=-1: must be a number of at least 0"),
        ("loss.kure_target=1", "loss.kure_target=1: must be a number above 1"),
        ("loss.kure_reduction=avg", "loss.kure_reduction='avg': must be one of mean, sum, max"),
    ],
)
def test_impossible_settings(tmp_path, refused, setting, message):
    assert refused("train", tiny(tmp_path / "run", setting)).endswith(message)


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
def test_the_weights_are_all_but_stem_and_head(preset, layers):
    net = vit() if preset == "fp" else quantized(preset)
    modules = dict(net.named_modules())
    expected = [modules[f"blocks.{block}.{layer}"].weight for block in (0, 1) for layer in layers]
    found = latent_weights(net)
    assert {id(w) for w in found if w.is_leaf} == {id(w) for w in expected}
    folded = [w for w in found if not w.is_leaf]
    assert (
        [w.shape for w in folded] == [block.attn.latent("qk").shape for block in net.blocks]
        if preset == "ofq"
        else folded == []
    )


def test_a_weight_that_is_there_twice_counts_once():
    net = vit()
    net.blocks[1].mlp = net.blocks[0].mlp
    assert len(latent_weights(net)) == 6
    net = vit()
    net.blocks[1].mlp.fc1.weight = net.blocks[0].mlp.fc1.weight
    assert len(latent_weights(net)) == 7


def test_convolutions_of_a_net_are_found_but_the_first():
    found = latent_weights(timm.create_model("resnet18", num_classes=10))
    assert len(found) == 19, (
        "torchvision's ResNet-18 has 20 convolutions; the paper's code regularizes 19"
    )
    assert all(weight.ndim == 4 for weight in found)


def test_nothing_to_act_on():
    with pytest.raises(
        qat.UsageError,
        match=r"loss.kure: this model has no linear layers or convolutions besides stem and heads",
    ):
        Kure().prepare(torch.nn.Sequential(torch.nn.LayerNorm(3)))
