"""BEiT's attention. Oracle: timm's where nothing is rounded."""

import copy

import pytest
import torch
from timm.models.beit import Attention
from torch import nn
from torch.testing import assert_close

import qat
from qat.model.transfer import timm_state_dict
from tests.tiny import float_recipe, shake

TOKENS, WIDTH, HEADS = 10, 16, 2  # a class token and a window of 3 x 3


class Holder(nn.Module):
    """Shows an attention to `convert`: (B, 1, N, C) to (B, N, C)."""

    def __init__(self, attention, shared=None):
        super().__init__()
        self.attn = attention
        self.shared = shared

    def forward(self, x):
        return self.attn(x.squeeze(1), shared_rel_pos_bias=self.shared)


def attention(**settings):
    torch.manual_seed(0)
    return shake(Attention(WIDTH, num_heads=HEADS, **{"qkv_bias": True, "window_size": (3, 3), **settings})).eval()


def images():
    return torch.randn(3, 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def swapped(plain, recipe, shared=None):
    return qat.convert(Holder(copy.deepcopy(plain), shared), recipe, input_size=(1, TOKENS, WIDTH))


@pytest.mark.parametrize(
    "settings", [{}, {"qkv_bias": False}, {"window_size": None}, {"attn_head_dim": 8}, {"qkv_bias_separate": True}], ids=str
)
@pytest.mark.parametrize("kind", ["qkr", "standard", "float"])
@pytest.mark.parametrize("shared", [False, True])
def test_without_rounding_it_is_timms(settings, kind, shared):
    plain = attention(**settings)
    bias = torch.randn(1, HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) if shared else None
    assert_close(swapped(plain, float_recipe(kind), bias)(images()), Holder(plain, bias)(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("frozen", "kept"), [("q_bias", "q_bias"), ("v_bias", "v.bias")])
def test_a_frozen_bias_stays_frozen(frozen, kept):
    plain = attention()
    plain.get_parameter(frozen).requires_grad = False
    attn = swapped(plain, qat.recipe("ofq", qk_bias="fold")).attn
    assert [name for name in ("q_weight", "q_bias", "v.bias") if not attn.get_parameter(name).requires_grad] == [kept]


@pytest.mark.parametrize("qk_bias", ["drop", "fold"])
def test_weights_go_back_under_timms_names(qk_bias):
    plain = attention()
    expected = {f"attn.{name}": value for name, value in plain.state_dict().items()}
    if qk_bias == "drop":
        expected["attn.q_bias"] = torch.zeros(WIDTH)
    kept = timm_state_dict(swapped(plain, qat.recipe("ofq", qk_bias=qk_bias)))
    assert set(kept) == set(expected)
    assert all(torch.equal(kept[name], value) for name, value in expected.items())
