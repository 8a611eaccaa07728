"""The L1 norm of the gradient. Oracles: finite differences, analytic second derivatives, a run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.functional import lsq, statsq
from qat.losses import GradL1, StepContext
from tests.callbacks.fitting import fit, module
from tests.conftest import tiny
from tests.tiny import images, quantized, vit

TARGET = torch.arange(8) % 10


def tiny_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def context(net, x, target):
    return StepContext(net(x), target, None, net)


def test_value_and_gradient_against_finite_differences():
    net, x, target = tiny_net(), torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    term = GradL1(layers=["0", "2"])
    weights = [net[0].weight, net[2].weight]

    def task():
        return F.cross_entropy(net(x).float().double(), target).item()

    def norm():
        with torch.enable_grad():
            return term(context(net, x, target)).item()

    def slope(function, w, i, h):
        with torch.no_grad():
            flat = w.view(-1)
            old = flat[i].item()
            flat[i] = old + h
            up = function()
            flat[i] = old - h
            down = function()
            flat[i] = old
        return (up - down) / (2 * h)

    by_hand = sum(abs(slope(task, w, i, 1e-2)) for w in weights for i in range(w.numel()))
    value = term(context(net, x, target))
    assert value.item() == pytest.approx(by_hand, rel=1e-3)
    value.backward()
    for w in (*weights, net[4].weight):
        numeric = [slope(norm, w, i, 1e-3) for i in range(w.numel())]
        assert_close(w.grad.flatten(), torch.tensor(numeric, dtype=torch.float64), rtol=1e-2, atol=2e-3)


def test_lsq_and_statsq_differentiate_twice():
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 5, generator=generator) for _ in "xg")
    x, g, scale = x.requires_grad_(), g.requires_grad_(), torch.tensor([0.4]).requires_grad_()
    grad_x, grad_scale = torch.autograd.grad(lsq(x, scale, -2, 1, None), (x, scale), g, create_graph=True)
    inside = ((x / scale >= -2) & (x / scale <= 1)).float().detach()
    assert_close(torch.autograd.grad(grad_x.sum(), g, retain_graph=True)[0], inside)
    # d scale = sum g (round(clamp u) - u inside) / sqrt(15), u = x / scale; rounding has no derivative.
    by_x, by_g = torch.autograd.grad(grad_scale, (x, g))
    assert_close(by_x, (-g * inside / scale).detach() / 15**0.5)
    u = (x / scale).detach()
    assert_close(by_g, (u.clamp(-2, 1).round() - u * inside) / 15**0.5)
    (grad_w,) = torch.autograd.grad(statsq(x, 2), x, g, create_graph=True)
    assert torch.equal(torch.autograd.grad(grad_w, g, torch.ones_like(g))[0], torch.ones_like(g))


@pytest.mark.parametrize("preset", ["fp", "ofq", "ofq_noqkr", "lsq", "minmax"])
def test_float_and_quantized_nets(preset):
    net = (vit() if preset == "fp" else quantized(preset, bits=4)).train()
    term = GradL1()
    term.prepare(net)
    step = context(net, images(), TARGET)
    value = term(context(net, images(), TARGET))
    plain = torch.autograd.grad(F.cross_entropy(step.prediction, TARGET), [m.of(net) for m in term.latents])
    assert value.item() == pytest.approx(sum(g.abs().sum().item() for g in plain), rel=1e-5)
    value.backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in grads.values())
    assert grads["blocks.0.mlp.fc1.weight"].abs().sum() > 0


def test_the_swapped_net_without_rounding_has_the_float_nets_norm():
    recipe = qat.recipe("ofq_noqkr", weight_quantizer="float", act_quantizer="float")
    net = qat.convert(vit(), recipe, input_size=(1, 8, 8))
    values = [fit_free(n) for n in (net, vit())]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def fit_free(net):
    term = GradL1()
    term.prepare(net)
    return term(context(net, images(), TARGET)).item()


def test_training_lowers_it():
    norms = []
    for terms in ({}, {"grad_l1": GradL1(0.05)}):
        learner = module(vit(), lr=1e-3, terms=terms)
        fit(learner, max_epochs=4)
        norms.append(fit_free(learner.net.eval()))
    assert norms[1] < 0.7 * norms[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("loss.grad_l1=-1",), "loss.grad_l1=-1: must be a number of at least 0"),
        (
            ("loss.grad_l1=0.05", "compile=true"),
            "compile=true: loss.grad_l1=0.05 differentiates twice, which compiled nets cannot; must be false",
        ),
        (
            ("loss.grad_l1=0.05", "trainer.precision=16-mixed"),
            "trainer.precision='16-mixed': loss.grad_l1=0.05 has gradients below fp16's range; must be one of 32-true, bf16-mixed, 64-true",
        ),
        (
            ("loss.grad_l1=0.05", "loss.grad_l1_layers=[no]"),
            "loss.grad_l1_layers='no' matches no layer; names are like 'blocks.0.attn', roles are weight, qk",
        ),
    ],
)
def test_impossible_settings(tmp_path, refused, settings, message):
    assert refused("train", tiny(tmp_path / "run", *settings)).endswith(message)
