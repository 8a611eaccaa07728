"""The term and its settings. Oracles: the formula on each layer, runs that come out the same, one-line errors."""

import copy
import csv

import pytest
import torch
from torch.testing import assert_close

from qat.functional import kure_loss, kurtosis
from qat.losses import CompositeLoss, CrossEntropy, Kure, StepContext
from qat.tasks import build
from tests.conftest import compose, tiny, train
from tests.tiny import images, quantized, sites, vit


def step(net):
    return StepContext(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), None, net)


def weights(net):
    outside = ("patch_embed.", "head.")
    return [site.latent() for name, site in sites(net).items() if site.is_weight and not name.startswith(outside)]


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr", "lsq", "minmax"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_the_term_is_the_loss_of_the_float_masters(preset, reduction):
    net = quantized(preset, bits=2)
    term = Kure(target=2.5, reduction=reduction)
    assert_close(term(step(net)), kure_loss(weights(net), 2.5, reduction))
    expected = torch.stack([kurtosis(w) for w in weights(net)]).detach()
    assert_close(term.watched, {f"kurtosis_{name}": getattr(expected, name)() for name in ("mean", "min", "max")})
    assert not any(value.requires_grad for value in term.watched.values())


def test_both_factors_of_the_product_are_pulled():
    net = quantized("ofq")
    Kure(layers=["qk"])(step(net)).backward()
    moved = [name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved == [f"blocks.{i}.attn.{f}_weight" for i in (0, 1) for f in "qk"]


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
    plain = Kure(qk="both")(step(quantised))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Kure(qk="both")(step(quantised)), plain)


def test_off_is_off():
    assert set(build.build_loss(compose("train", "run_dir=a")).terms) == {"ce"}
    on = build.build_loss(compose("train", "run_dir=a", "loss.kure=1"))
    assert set(on.terms) == {"ce", "kure"}
    assert (on.terms["kure"].weight, on.terms["kure"].target, on.terms["kure"].reduction, on.terms["kure"].qk) == (
        1,
        1.8,
        "mean",
        "product",
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.kure=-1", "loss.kure=-1: must be a number of at least 0"),
        ("loss.kure=x", "loss.kure='x': must be a number of at least 0"),
        ("loss.kure_target=1", "loss.kure_target=1: must be a number above 1"),
        ("loss.kure_target=null", "loss.kure_target=None: must be a number above 1"),
        ("loss.kure_reduction=avg", "loss.kure_reduction='avg': must be one of mean, sum, max"),
        ("loss.kure_qk=all", "loss.kure_qk='all': must be one of product, factors, both"),
        ("loss.kure_layers=3", "loss.kure_layers=3: must be a list of globs such as blocks.*.attn.qkv, or roles (weight, qk)"),
    ],
)
def test_impossible_settings(tmp_path, refused, setting, message):
    assert refused("train", tiny(tmp_path / "run", setting)).endswith(message)


def test_a_run_logs_the_kurtoses(tmp_path):
    run = train(tmp_path / "run", "loss.kure=1", "trainer.log_every_n_steps=1", "callbacks=[default,ema]")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    logged = [float(row["train/kurtosis_mean"]) for row in rows if row["train/kurtosis_mean"]]
    assert len(logged) == 2
    assert all(1.5 < value < 4 for value in logged)
    assert any(row["train/loss_kure"] for row in rows)


def test_copies_of_a_module_look_at_their_own_net():
    loss = CompositeLoss({"ce": CrossEntropy(), "kure": Kure()})
    net = vit()
    loss.prepare(net)
    twin, other = copy.deepcopy(loss), vit()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.uniform_(-1, 1)
    both = [one(StepContext(n(images()), torch.arange(8), None, n))[1]["kure"] for one, n in ((loss, net), (twin, other))]
    assert both[1] < both[0]
