"""Dampening. Oracles: the sum written out on the quantizer's own levels, finite schedule values, the sign of its gradient."""

import pytest
import torch
from torch.testing import assert_close

from qat.losses import Dampening, LossTerm
from tests.callbacks.fitting import fit, module
from tests.errors import usage_error
from tests.losses.common import step
from tests.tiny import quantized, sites, vit


def by_hand(site):
    """Sum of (w_q - w)^2 over weights between the outermost levels; what lies beyond them counts nothing."""
    latent = site.latent().detach()
    levels = site.quantizer(latent)
    codes, spec = site.quantizer.codes(latent), site.quantizer.spec
    beyond = ((codes == spec.qmin) & (latent < levels)) | ((codes == spec.qmax) & (latent > levels))
    return torch.where(beyond, 0.0, levels - latent).square().sum()


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr", "lsq"])
def test_the_sum(preset):
    net = quantized(preset, bits=2)
    weights = [site for site in sites(net).values() if site.is_weight]
    inside = [by_hand(site) for site in weights if site.quantizer.spec.bits <= 4]
    assert len(inside) == (10 if preset == "ofq" else 8)
    assert_close(Dampening()(step(net)), sum(inside))
    assert_close(Dampening(max_bits=8)(step(net)), sum(by_hand(site) for site in weights))


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 0.0), (0.25, 0.5 - 0.5 * 0.5**0.5), (0.5, 0.5), (1.0, 1.0)]
)
def test_it_grows_along_a_cosine(progress, share):
    net = quantized(bits=2)
    assert_close(Dampening()(step(net, progress)), share * Dampening()(step(net)))


@pytest.mark.parametrize("preset", ["ofq_noqkr", "lsq"])
def test_the_gradient_pulls_to_the_level(preset):
    net = quantized(preset, bits=2)
    Dampening()(step(net)).backward()
    site = sites(net)["blocks.0.mlp.fc1.weight_quantizer"]
    weight = site.owner.weight
    pull, distance = -weight.grad, site.quantizer(weight).detach() - weight.detach()
    free = pull == 0
    assert_close(pull[~free], 2 * distance[~free])
    codes = site.quantizer.codes(weight)[free]
    assert set(codes.tolist()) <= {-2, 1}, "only beyond the outermost levels"
    assert 0 < free.float().mean() < 0.5
    assert all(p.grad is None for name, p in net.named_parameters() if name.endswith("scale"))


def test_a_net_without_such_weights():
    with usage_error("Dampening.max_bits=4: "):
        Dampening()(step(vit()))


def test_training_says_how_far_it_is():
    seen = []

    class Look(LossTerm):
        def forward(self, step):
            seen.append(step.progress)
            return step.prediction.sum() * 0

    fit(module(quantized(bits=2), terms={"look": Look()}), accumulate_grad_batches=2)
    assert seen == pytest.approx([t / 4 for t in range(4) for _ in range(2)])
