"""Attention with rotary positions. Oracle: timm's where nothing is rounded, the formula written out where something is."""

import copy

import pytest
import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import nn
from torch.testing import assert_close

import qat
from tests.tiny import float_recipe, shake

TOKENS, WIDTH, HEADS = 7, 16, 4


class Holder(nn.Module):
    """Shows an attention to `convert`: (B, 1, N, C) to (B, N, C), with positions for all tokens but the first."""

    def __init__(self, attention, **inputs):
        super().__init__()
        self.attn = attention
        self.inputs = inputs

    def forward(self, x):
        return self.attn(x.squeeze(1), **self.inputs)


def rope(head_dim=WIDTH // HEADS):
    return torch.randn(TOKENS - 1, 2 * head_dim, generator=torch.Generator().manual_seed(3))


def images():
    return torch.randn(3, 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def attention(cls, **settings):
    torch.manual_seed(0)
    return shake(cls(WIDTH, num_heads=HEADS, **{"norm_layer": nn.LayerNorm, "scale_norm": False, **settings})).eval()


def swapped(plain, recipe, **inputs):
    return qat.convert(Holder(copy.deepcopy(plain), **inputs), recipe, input_size=(1, TOKENS, WIDTH))


EVA = [
    {},
    {"qkv_fused": False},
    {"qkv_bias": False},
    {"qkv_bias_separate": True},
    {"qk_norm": True},
    {"scale_norm": True},
    {"rotate_half": True},
    {"gated": True},
    {"num_prefix_tokens": 1, "attn_drop": 0.5},
]
ROPE = [
    {},
    {"qkv_fused": False},
    {"qkv_fused": False, "num_kv_heads": 2},
    {"dim_out": 10},
    {"qk_norm": True, "scale_norm": True},
    {"rotate_half": True},
]


@pytest.mark.parametrize(("cls", "settings"), [(EvaAttention, s) for s in EVA] + [(AttentionRope, s) for s in ROPE], ids=str)
@pytest.mark.parametrize("kind", ["standard", "float"])
def test_without_rounding_it_is_timms(cls, settings, kind):
    plain = attention(cls, **settings)
    for inputs in ({"rope": rope()}, {"rope": None}, {"rope": rope(), "is_causal": True}):
        assert_close(swapped(plain, float_recipe(kind), **inputs)(images()), Holder(plain, **inputs)(images()), rtol=1e-5, atol=1e-5)


def test_rotated_then_quantized():
    net = swapped(attention(EvaAttention), qat.recipe("ofq_noqkr", bits=2), rope=rope())
    qat.initialize_scales(net, [images()])
    attn, x = net.attn, images().squeeze(1)
    q, k, v = (attn.qkv(x) + torch.cat([attn.q_bias, torch.zeros(WIDTH), attn.v_bias])).chunk(3, -1)

    def rotated(t):
        t = t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return torch.cat([t[:, :, :1], apply_rot_embed_cat(t[:, :, 1:], rope())], 2).transpose(1, 2).flatten(2)

    def heads(t):
        return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    scores = heads(attn.q_quantizer(rotated(q))) @ heads(attn.k_quantizer(rotated(k))).transpose(-1, -2) / (WIDTH / HEADS) ** 0.5
    out = attn.proj((attn.probs_quantizer(scores.softmax(-1)) @ heads(attn.v_quantizer(v))).transpose(1, 2).flatten(2))
    assert_close(net(images()), out)


@pytest.mark.parametrize("cls", [EvaAttention, AttentionRope])
def test_reparameterization_is_refused(cls):
    with pytest.raises(qat.UsageError, match="quant.attention='qkr': this net rotates queries and keys by position"):
        swapped(attention(cls), qat.recipe("ofq"), rope=rope())
