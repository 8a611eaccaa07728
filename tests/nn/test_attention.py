"""What all attentions share. Oracle: loops over heads and windows written out."""

import pytest
import torch

import qat
from qat.nn import attention
from tests.nets import ATTENTIONS
from tests.tiny import SIZE, quantized, vit


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
