"""Levels of weight quantizers. Oracle: a quantizer's own output on its own codes."""

import pytest
import torch
from torch.testing import assert_close

from qat.quantizers.grid import has_grid, weight_grid
from tests.tiny import quantized, sites


@pytest.mark.parametrize("preset", ["ofq", "lsq"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_code_stands_for_its_level(preset, bits):
    weights = [site for site in sites(quantized(preset, bits=bits)).values() if site.is_weight]
    assert len(weights) >= 10
    for site in weights:
        latent = site.latent().detach()
        step, shift = weight_grid(site.quantizer, latent)
        assert has_grid(site.quantizer)
        assert not step.requires_grad
        assert_close((site.quantizer.codes(latent) + shift) * step, site.quantizer(latent).detach(), rtol=1e-6, atol=1e-7)


def test_others_have_none():
    site = sites(quantized("minmax", bits=4))["blocks.0.mlp.fc1.weight_quantizer"]
    assert not has_grid(site.quantizer)
    with pytest.raises(TypeError, match="DynamicMinMax has no grid"):
        weight_grid(site.quantizer, torch.zeros(2, 2))
