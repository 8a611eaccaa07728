"""What all attentions share. Oracle: loops over heads and windows written out."""

import pytest
import torch
from torch import nn

import qat
from qat.nn import attention
from tests.nets import ATTENTIONS
from tests.tiny import SIZE, quantized, vit


def test_heads():
    t = torch.arange(2 * 3 * 8).view(2, 3, 8)
    out = attention.split_heads(t, 4)
    assert out.shape == (2, 4, 3, 2)
    assert all(torch.equal(out[:, h], t[..., 2 * h : 2 * h + 2]) for h in range(4))


def test_mask_of_windows():
    scores, mask = torch.randn(6, 2, 4, 4), torch.randn(3, 4, 4)
    out = attention.add_window_mask(scores, mask)
    for image in range(2):
        for window in range(3):
            i = 3 * image + window
            assert torch.equal(out[i], scores[i] + mask[window])
    assert attention.add_window_mask(scores, None) is scores


def test_bias_beside_qkv():
    holder = nn.Module()
    holder.q_bias, holder.v_bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 3.0))
    assert attention.qkv_bias(holder).tolist() == [1, 1, 0, 0, 3, 3]
    holder.q_bias = None
    assert attention.qkv_bias(holder) is None


def test_refusal():
    with pytest.raises(
        qat.UsageError, match="quant.attention='qkr': this net hums, so Wq\\^T Wk is not its score; here it must be one of standard, float"
    ):
        attention.refuse_qkr("hums")


def test_one_step_per_token_is_shared_by_heads():
    attn = quantized("ofq_noqkr", bits=2).blocks[0].attn
    q, k = torch.randn(2, 2, 17, 16), torch.randn(2, 2, 17, 16)
    flat = [t.transpose(1, 2).flatten(2) for t in (q, k)]
    expected = [quantizer(t).unflatten(-1, (2, 16)) for quantizer, t in zip((attn.q_quantizer, attn.k_quantizer), flat, strict=True)]
    scores = torch.einsum("bnhd,bmhd->bhnm", *expected)
    torch.testing.assert_close(attn.scores(q, k), scores)


@pytest.mark.parametrize(("name", "scores"), [("deit", 2 * 25), ("swin", 4 * 2 * 16**2)])
def test_number_of_scores(name, scores):
    net = qat.convert(ATTENTIONS[name].build(), qat.recipe("ofq_noqkr"), input_size=ATTENTIONS[name].input_size)
    qat.initialize_scales(net, [ATTENTIONS[name].images(1)])
    attn = next(m for m in net.modules() if isinstance(m, attention.ScoredAttention))
    seen = []
    attn.register_forward_pre_hook(lambda m, args: seen.append(m.n_scores(args[0])))
    net(ATTENTIONS[name].images(1))
    assert seen == [scores]


def test_weights_under_timms_names():
    # More than one head, and biases that are told apart.
    attn = quantized("ofq", qk_bias="fold").blocks[0].attn
    weights = attn.timm_weights()
    assert torch.equal(weights["qkv.weight"], torch.cat([attn.q_weight, attn.k_weight, attn.v.weight]))
    assert torch.equal(weights["qkv.bias"], torch.cat([attn.q_bias, torch.zeros(32), attn.v.bias]))
    assert not any(t.requires_grad for t in weights.values())


@pytest.mark.parametrize("frozen", ["qkv.weight", "qkv.bias"])
def test_what_is_frozen_stays_frozen(frozen):
    net = vit()
    for block in net.blocks:
        block.attn.get_parameter(frozen).requires_grad = False
    with torch.no_grad():  # says nothing about what learns
        attn = qat.convert(net, qat.recipe("ofq", qk_bias="fold"), input_size=SIZE).blocks[0].attn
    learns = {name: attn.get_parameter(name).requires_grad for name in ("q_weight", "k_weight", "v.weight", "q_bias", "v.bias")}
    assert {name for name, is_learning in learns.items() if not is_learning} == {
        "qkv.weight": {"q_weight", "k_weight", "v.weight"},
        "qkv.bias": {"q_bias", "v.bias"},
    }[frozen]
