"""Weights that are cached between forward passes. Oracle: a model without cached weights."""

import copy

import pytest
import torch

from qat.nn.quant_module import QuantModule, cached_weights, keep_weights
from tests.tiny import identical, images, quantized, sites


@pytest.fixture(params=["ofq", "ofq_noqkr", "lsq", "minmax"])
def net(request):
    return quantized(request.param, bits=2)


def count(net, monkeypatch):
    """Names of the weight quantizers that are run from now on. Counted in their classes: one that is patched itself is asked every time."""
    runs, names = [], {site.quantizer: name for name, site in sites(net).items() if site.is_weight}
    for kind in {type(quantizer) for quantizer in names}:

        def counted(self, x, forward=kind.forward):
            runs.extend([names[self]] if self in names else [])
            return forward(self, x)

        monkeypatch.setattr(kind, "forward", counted)
    return runs


def test_each_weight_is_quantized_once(net, monkeypatch):
    expected = net(images()).detach()
    runs = count(net, monkeypatch)
    with torch.no_grad(), cached_weights(net):
        assert all(torch.equal(net(images()), expected) for _ in range(3))
    assert sorted(runs) == sorted(name for name, site in sites(net).items() if site.is_weight)
    assert all(m.weight_cache is None for m in net.modules() if isinstance(m, QuantModule))


@pytest.mark.sample(1)
@torch.no_grad()
def test_what_has_changed_is_quantized_anew(net):
    keep_weights(net, keep=True)
    net(images())
    for name, parameter in net.named_parameters():
        parameter.mul_(1.5)
        fresh = copy.deepcopy(net)
        keep_weights(fresh, keep=False)
        assert torch.equal(net(images()), fresh(images())), name


def test_gradients_are_the_same(net):
    def gradients():
        net.zero_grad()
        for seed in (0, 1):  # as in gradient accumulation
            net(images(seed=seed)).square().sum().backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    expected = gradients()
    keep_weights(net, keep=True)
    assert identical(gradients(), expected)


def test_evaluation_in_inference_mode_leaves_nothing_to_training():
    net = quantized("ofq", bits=2)
    keep_weights(net, keep=True)
    with torch.inference_mode():
        net(images())
    net(images()).sum().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if name.endswith("weight"))
