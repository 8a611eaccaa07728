"""What all attentions share, and what some have of their own. Oracle: the formula written out; timm's names and tensors."""

import pytest
import timm.layers
import torch
from timm.layers import AttentionPoolLatent, AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import nn
from torch.testing import assert_close

import qat
from qat.model.transfer import timm_state_dict
from qat.nn import attention
from tests.errors import usage_error
from tests.nets import ATTENTIONS
from tests.nn.shown import WIDTH, attend, heads, merged, swapped
from tests.tiny import identical, randn, shake, sites

TOKENS = 10
FOLD = qat.recipe("ofq", qk_bias="fold")


def plain(cls, **settings):
    torch.manual_seed(0)
    return shake(cls(WIDTH, num_heads=2, **settings)).eval()


def vit():
    return plain(timm.layers.Attention, qkv_bias=True)


def beit():
    return plain(BeitAttention, qkv_bias=True, window_size=(3, 3))


@pytest.mark.parametrize(("name", "scores"), [("deit", 2 * 25), ("swin", 4 * 2 * 16**2)])
def test_number_of_scores(name, scores):
    family = ATTENTIONS[name]
    net = family.quantized("ofq_noqkr")
    attn = next(m for m in net.modules() if isinstance(m, attention.ScoredAttention))
    seen = []
    attn.register_forward_pre_hook(lambda m, args: seen.append(m.num_scores(args[0])))
    net(family.images(1))
    assert seen == [scores]


@pytest.mark.parametrize(
    ("make", "qk_bias", "lost"),
    [
        (vit, "fold", slice(WIDTH, 2 * WIDTH)),
        (vit, "drop", slice(0, 2 * WIDTH)),
        (beit, "fold", slice(0)),
        (beit, "drop", slice(None)),
    ],
)
def test_weights_go_back_under_timms_names(make, qk_bias, lost):
    """All but the biases that a softmax is blind to, or that the recipe drops."""
    expected = {f"attn.{name}": value.clone() for name, value in make().state_dict().items()}
    expected["attn.qkv.bias" if make is vit else "attn.q_bias"][lost] = 0
    kept = timm_state_dict(swapped(make(), qat.recipe("ofq", qk_bias=qk_bias), TOKENS))
    assert identical(kept, expected)


@pytest.mark.parametrize(
    ("make", "frozen", "kept"),
    [
        (vit, "qkv.weight", {"q_weight", "k_weight", "v.weight"}),
        (vit, "qkv.bias", {"q_bias", "v.bias"}),
        (beit, "q_bias", {"q_bias"}),
        (beit, "v_bias", {"v.bias"}),
    ],
)
def test_what_is_frozen_stays_frozen(make, frozen, kept):
    net = make()
    net.get_parameter(frozen).requires_grad = False
    with torch.no_grad():  # says nothing about what learns
        attn = swapped(net, FOLD, TOKENS).attn
    assert {
        n
        for n in ("q_weight", "k_weight", "v.weight", "q_bias", "v.bias")
        if not attn.get_parameter(n).requires_grad
    } == kept


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (timm.layers.Attention, {"qk_norm": True, "norm_layer": nn.LayerNorm}),
        (EvaAttention, {"scale_norm": False}),
        (AttentionRope, {"scale_norm": False}),
    ],
    ids=["normalized", "eva", "rotated"],
)
def test_reparameterization_is_refused(cls, settings):
    message = "^quant.attention='qkr': .* must be one of standard, float"
    with usage_error(message):
        swapped(plain(cls, **settings), qat.recipe("ofq"), TOKENS)


def test_rotated_then_quantized():
    rope, x = randn(TOKENS - 1, WIDTH, seed=3), randn(3, 1, TOKENS, WIDTH)
    net = swapped(
        plain(EvaAttention, scale_norm=False), qat.recipe("ofq_noqkr", bits=2), TOKENS, rope=rope
    )
    attn = qat.initialize_scales(net, [x]).attn

    def rotated(t):
        t = heads(t)
        return merged(torch.cat([t[:, :, :1], apply_rot_embed_cat(t[:, :, 1:], rope)], 2))

    bias = torch.cat([attn.q_bias, torch.zeros(WIDTH), attn.v_bias])
    q, k, v = (attn.qkv(x.squeeze(1)) + bias).chunk(3, -1)
    q, k = heads(attn.q_quantizer(rotated(q))), heads(attn.k_quantizer(rotated(k)))
    assert_close(net(x), attend(attn, q @ k.transpose(-1, -2) / (WIDTH / 2) ** 0.5, v))


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_a_pools_queries_have_a_scale_each_and_keys_one_per_token(preset):
    plain_pool = plain(AttentionPoolLatent, latent_len=3)
    net = swapped(plain_pool, qat.recipe(preset, bits=2), TOKENS)
    x = randn(3, 1, TOKENS, WIDTH)
    for role, num_stored_scales in {"q": 3, "k": TOKENS, "probs": 3, "v": WIDTH}.items():
        assert sites(net)[f"attn.{role}_quantizer"].quantizer.num_stored_scales == num_stored_scales
    assert sites(net)["attn.mlp.fc2.input_quantizer"].quantizer.spec.signed is False
    assert qat.initialize_scales(net, [x])(x).isfinite().all()
    assert net.attn.num_scores(x[:2].squeeze(1)) == 2 * 2 * 3 * TOKENS
