"""Pooling by attention. Oracle: timm's where nothing is rounded."""

import copy

import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch import nn
from torch.testing import assert_close

import qat
from tests.tiny import float_recipe, shake, sites

TOKENS, WIDTH, HEADS = 6, 16, 2


class Holder(nn.Module):
    """Shows a pool to `convert`: (B, 1, N, C) to (B, N, C)."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x.squeeze(1))


def pool(**settings):
    torch.manual_seed(0)
    return shake(AttentionPoolLatent(WIDTH, num_heads=HEADS, **settings)).eval()


def images():
    return torch.randn(3, 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def swapped(plain, recipe):
    return qat.convert(Holder(copy.deepcopy(plain)), recipe, input_size=(1, TOKENS, WIDTH))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"latent_len": 3},
        {"latent_len": 3, "pool_type": "avg"},
        {"latent_len": 3, "pool_type": ""},
        {"q_proj": False},
        {"qk_norm": True},
        {"out_features": 0},
        {"pos_embed": "abs", "feat_size": TOKENS},
        {"norm_layer": nn.LayerNorm, "out_features": 8},
        {"embed_dim": WIDTH, "latent_dim": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["qkr", "standard", "float"])
def test_without_rounding_it_is_timms(settings, kind):
    plain = pool(**settings)
    assert_close(swapped(plain, float_recipe(kind))(images()), Holder(plain)(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_queries_have_a_scale_each_and_keys_one_per_token(preset):
    net = swapped(pool(latent_len=3), qat.recipe(preset, bits=2))
    found = {name: s.quantizer.n_scales for name, s in sites(net).items()}
    assert (found["pool.q_quantizer"], found["pool.k_quantizer"], found["pool.probs_quantizer"]) == (3, TOKENS, 3)
    assert found["pool.v_quantizer"] == WIDTH
    assert sites(net)["pool.mlp.fc2.input_quantizer"].quantizer.spec.signed is False
    assert qat.initialize_scales(net, [images()])(images()).isfinite().all()
    assert net.pool.n_scores(torch.zeros(2, TOKENS, WIDTH)) == 2 * HEADS * 3 * TOKENS
