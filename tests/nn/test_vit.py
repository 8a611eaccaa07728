"""Quantized attention. Oracle: timm's attention where nothing is rounded, the formula written out where something is."""

import copy

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat import functional as QF
from qat.nn import QkrAttention, QuantAttention
from tests.tiny import float_recipe, quantized, shake

TOKENS, WIDTH, HEADS = 6, 16, 2


class Holder(nn.Module):
    """Shows an attention to `convert`: (B, 1, N, C) to (B, N, C)."""

    def __init__(self, attention):
        super().__init__()
        self.attn = attention

    def forward(self, x):
        return self.attn(x.squeeze(1))


def attention(**settings):
    torch.manual_seed(0)
    return shake(timm.layers.Attention(WIDTH, **{"num_heads": HEADS, "qkv_bias": True, **settings})).eval()


def swapped(plain, recipe):
    net = qat.convert(Holder(copy.deepcopy(plain)), recipe, input_size=(1, TOKENS, WIDTH))
    return net.attn


def tokens(seed=0):
    return torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


SETTINGS = [
    {},
    {"qkv_bias": False},
    {"proj_bias": False},
    {"gated": True},
    {"scale_norm": True, "norm_layer": nn.LayerNorm},
    {"attn_head_dim": 4},
    {"dim_out": 10},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["qkr", "standard", "float"])
def test_without_rounding_it_is_timms(kind, settings):
    plain = attention(**settings)
    ours = swapped(plain, float_recipe(kind))
    assert isinstance(ours, {"qkr": QkrAttention, "standard": QuantAttention, "float": timm.layers.Attention}[kind])
    assert_close(ours(tokens()), plain(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qkr", "standard"])
@pytest.mark.parametrize(
    "masking",
    [{"is_causal": True}, {"attn_mask": torch.ones(TOKENS, TOKENS).tril(1).bool()}, {"attn_mask": torch.randn(TOKENS, TOKENS)}],
    ids=["causal", "bool", "additive"],
)
def test_masks_are_timms(kind, masking):
    plain = attention()
    out = plain(tokens(), **masking)
    assert (out - plain(tokens())).abs().max() > 0.1
    assert_close(swapped(plain, float_recipe(kind))(tokens(), **masking), out, rtol=1e-5, atol=1e-5)


def test_normalised_queries_stay_normalised():
    plain = attention(qk_norm=True, norm_layer=nn.LayerNorm)
    assert_close(swapped(plain, float_recipe("standard"))(tokens()), plain(tokens()), rtol=1e-5, atol=1e-5)


def test_qkr_refuses_normalised_queries():
    message = "quant.attention='qkr': this net normalises queries and keys, so .* here it must be one of standard, float"
    with pytest.raises(qat.UsageError, match=message):
        swapped(attention(qk_norm=True, norm_layer=nn.LayerNorm), float_recipe("qkr"))


def test_dropped_bias_is_that_of_the_query_alone():
    plain = attention()
    recipe = qat.recipe("ofq", qk_bias="drop", weight_quantizer="float", act_quantizer="float")
    ours = swapped(plain, recipe)
    assert (ours(tokens()) - plain(tokens())).abs().max() > 0.1
    with torch.no_grad():
        plain.qkv.bias[:WIDTH] = 0
    assert_close(ours(tokens()), plain(tokens()), rtol=1e-5, atol=1e-5)


def heads(t):
    return t.unflatten(-1, (2, -1)).transpose(1, 2)


def attend(attn, scores, v):
    probs = attn.probs_quantizer(scores.softmax(-1))
    return attn.proj((probs @ heads(attn.v_quantizer(v))).transpose(1, 2).flatten(2))


def test_standard_attention_step_by_step():
    attn = quantized("ofq_noqkr", bits=2).blocks[0].attn
    x = torch.randn(3, 17, 32)
    q, k, v = attn.qkv(x).chunk(3, -1)
    scores = heads(attn.q_quantizer(q)) @ heads(attn.k_quantizer(k)).transpose(-1, -2) / 4
    assert_close(attn(x), attend(attn, scores, v))


@pytest.mark.parametrize("qk_bias", ["drop", "fold"])
def test_qkr_step_by_step(qk_bias):
    attn = quantized("ofq", bits=2, qk_bias=qk_bias).blocks[0].attn
    with torch.no_grad():
        attn.product_offset.normal_()
    x = torch.randn(3, 17, 32)
    xq = attn.input_quantizer(x)
    folded = QF.statsq(QF.fold_qk(attn.q_weight, attn.k_weight, 2), 2).unflatten(0, (2, 32))
    scale = attn.k_quantizer.scale.view(17, 2)
    scores = []
    for h in range(2):
        y = xq @ folded[h].T + attn.product_offset.view(2, 32)[h]
        score = xq @ QF.lsq(y, scale[:, h], -2, 1, 1).transpose(1, 2)
        if qk_bias == "fold":
            k = attn.k_weight.unflatten(0, (2, 16))[h]
            score = score + (xq @ k.T @ attn.q_bias.view(2, 16)[h]).unsqueeze(1)
        scores.append(score / 4)
    v = F.linear(xq, QF.statsq(attn.v.weight, 2), attn.v.bias)
    assert_close(attn(x), attend(attn, torch.stack(scores, 1), v))


def test_latent_of_qk_is_the_folded_weight():
    attn = quantized().blocks[0].attn
    assert torch.equal(attn.latent("qk"), QF.fold_qk(attn.q_weight, attn.k_weight, 2))
    with pytest.raises(KeyError, match="weight"):
        attn.latent("weight")
