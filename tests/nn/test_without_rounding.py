"""Attentions without rounding. Oracle: timm's own, in every setting that it has."""

import pytest
import timm.layers
import torch
from timm.layers import AttentionPoolLatent, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import nn
from torch.testing import assert_close

import qat
from tests.nets import ATTENTIONS
from tests.nn.shown import WIDTH, Holder, swapped
from tests.tiny import float_recipe, logits, randn, shake

VIT = {"num_heads": 2, "qkv_bias": True}
BEIT = {**VIT, "window_size": (3, 3)}
ROPE = {"num_heads": 4, "norm_layer": nn.LayerNorm, "scale_norm": False}
POOL = {"num_heads": 2}
TOKENS = 10  # a class token and a window of 3 x 3
EVERY, NO_QKR = ("qkr", "standard", "float"), ("standard", "float")
ROTATED = (
    {"rope": randn(TOKENS - 1, 8, seed=3)},
    {"rope": None},
    {"rope": randn(TOKENS - 1, 8, seed=3), "is_causal": True},
)
# Class, its settings, what is changed in them, forms of attention, further inputs of a call.
FAMILIES = [
    (
        timm.layers.Attention,
        VIT,
        [
            {},
            {"qkv_bias": False},
            {"proj_bias": False},
            {"gated": True},
            {"scale_norm": True, "norm_layer": nn.LayerNorm},
            {"attn_head_dim": 4},
            {"dim_out": 10},
        ],
        EVERY,
        ({},),
    ),
    (timm.layers.Attention, VIT, [{"qk_norm": True, "norm_layer": nn.LayerNorm}], NO_QKR, ({},)),
    (
        timm.layers.Attention,
        VIT,
        [{}],
        NO_QKR[:1] + EVERY[:1],
        (
            {"is_causal": True},
            {"attn_mask": torch.ones(TOKENS, TOKENS).tril(1).bool()},
            {"attn_mask": randn(TOKENS, TOKENS)},
        ),
    ),
    (
        BeitAttention,
        BEIT,
        [
            {},
            {"qkv_bias": False},
            {"window_size": None},
            {"attn_head_dim": 8},
            {"qkv_bias_separate": True},
        ],
        EVERY,
        ({}, {"shared_rel_pos_bias": randn(1, 2, TOKENS, TOKENS, seed=2)}),
    ),
    (
        EvaAttention,
        ROPE,
        [
            {},
            {"qkv_fused": False},
            {"qkv_bias": False},
            {"qkv_bias_separate": True},
            {"qk_norm": True},
            {"scale_norm": True},
            {"rotate_half": True},
            {"gated": True},
            {"num_prefix_tokens": 1, "attn_drop": 0.5},
        ],
        NO_QKR,
        ROTATED,
    ),
    (
        AttentionRope,
        ROPE,
        [
            {},
            {"qkv_fused": False},
            {"qkv_fused": False, "num_kv_heads": 2},
            {"dim_out": 10},
            {"qk_norm": True, "scale_norm": True},
            {"rotate_half": True},
        ],
        NO_QKR,
        ROTATED,
    ),
    (
        AttentionPoolLatent,
        POOL,
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
        EVERY,
        ({},),
    ),
]


@pytest.mark.parametrize(
    ("cls", "settings", "kind", "inputs"),
    [
        pytest.param(
            cls,
            base | changes,
            kind,
            inputs,
            id=f"{cls.__name__}-{changes}-{kind}-{','.join(inputs)}",
        )
        for cls, base, several, kinds, further in FAMILIES
        for changes in several
        for kind in kinds
        for inputs in further
    ],
)
def test_an_attention_is_timms(cls, settings, kind, inputs):
    torch.manual_seed(0)
    plain, x = shake(cls(WIDTH, **settings)).eval(), randn(3, 1, TOKENS, WIDTH)
    expected = Holder(plain, **inputs)(x)
    assert_close(
        swapped(plain, float_recipe(kind), TOKENS, **inputs)(x), expected, rtol=1e-5, atol=1e-5
    )
    if any(value is not None for value in inputs.values()):
        assert (expected - Holder(plain)(x)).abs().max() > 0.05, (
            "what comes in beside the tokens matters"
        )


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_relpos_small_patch16_224", {}),
        ("vit_srelpos_small_patch16_224", {}),
        ("vit_relpos_medium_patch16_cls_224", {}),
        ("vit_relpos_small_patch16_224", {"rel_pos_type": "bias"}),
    ],
)
def test_a_net_with_relative_positions_is_timms(kind, name, changes):
    def net():
        torch.manual_seed(0)
        small = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
        return shake(timm.create_model(name, **small, **changes)).eval()

    x = ATTENTIONS["relpos"].images()
    ours = qat.convert(net(), float_recipe(kind), input_size=(3, 32, 32))
    assert_close(logits(ours, x), logits(net(), x), rtol=1e-5, atol=1e-5)
    assert not [site.name for site in qat.iter_quantizers(ours) if "rel_pos" in site.name], (
        "what makes the bias stays float"
    )
