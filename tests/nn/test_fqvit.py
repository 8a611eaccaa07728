"""Quantizers behind layers. Oracle: FQ-ViT's forward, written out here, and timm's own where nothing is rounded."""

import copy

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.functional import integer_layer_norm
from qat.model.ptq_spec import PtqRecipe
from qat.model.transfer import timm_state_dict
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq import calibrate, in_float
from tests.tiny import DISTILLED, SIZE, VIT, images, logits, randn, vit

IN_BLOCK = {
    *(
        "attn.qkv.input_quantizer",
        "attn.qkv_quantizer",
        "attn.scores_quantizer",
        "attn.probs_quantizer",
        "attn.proj.input_quantizer",
    ),
    *(
        "attn.output_quantizer",
        "residual1_quantizer",
        "mlp.fc1.input_quantizer",
        "mlp.fc2.input_quantizer",
        "mlp_quantizer",
    ),
    "residual2_quantizer",
}
OUTSIDE = {
    *(
        "patch_embed.proj.input_quantizer",
        "patch_embed.output_quantizer",
        "tokens_quantizer",
        "positions_quantizer",
    ),
    *("embedding_quantizer", "head.input_quantizer", "head.output_quantizer"),
}


def placed(name=VIT, kwargs=None, **knobs):
    net = qat.convert(
        vit(name, **(kwargs or {})), PtqRecipe(**{"bits": 4, **knobs}), input_size=SIZE
    )
    calibrate(net, [images()])
    return net


@pytest.mark.parametrize(
    ("name", "more"),
    [(VIT, set()), (DISTILLED, {"head_dist.input_quantizer", "head_dist.output_quantizer"})],
)
def test_where_activations_are_quantized(name, more):
    sites = [site.name for site in qat.iter_quantizers(placed(name)) if not site.is_weight]
    assert len(sites) == len(set(sites))
    assert set(sites) == OUTSIDE | more | {
        f"blocks.{i}.{site}" for i in range(2) for site in IN_BLOCK
    }


def block_by_hand(block, x):
    attn, n = block.attn, block.norm1.normalized_shape
    y = F.layer_norm(x, n, block.norm1.weight, block.norm1.bias, block.norm1.eps)
    q, k, v = attn.qkv_quantizer(attn.qkv(y)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    probs = attn.probs_quantizer(attn.scores_quantizer(q @ k.transpose(-1, -2) / 4).softmax(-1))
    x = block.residual1_quantizer(
        x + attn.output_quantizer(attn.proj((probs @ v).transpose(1, 2).flatten(2)))
    )
    y = F.layer_norm(x, n, block.norm2.weight, block.norm2.bias, block.norm2.eps)
    return block.residual2_quantizer(
        x + block.mlp_quantizer(block.mlp.fc2(F.gelu(block.mlp.fc1(y))))
    )


@torch.no_grad()
def test_step_by_step():
    net = placed(residual_observer="ptf")
    x = net.patch_embed.output_quantizer(net.patch_embed.proj(images()).flatten(2).transpose(1, 2))
    x = net.tokens_quantizer(torch.cat([net.cls_token.expand(8, -1, -1), x], 1))
    x = net.embedding_quantizer(x + net.positions_quantizer(net.pos_embed))
    for block in net.blocks:
        assert_close(block(x), block_by_hand(block, x))
        x = block(x)
    assert_close(net(images()), net.head(net.norm(x)[:, 0]))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (VIT, {}),
        (DISTILLED, {}),
        (VIT, {"no_embed_class": True, "reg_tokens": 2}),
        (VIT, {"class_token": False, "global_pool": "avg"}),
        (VIT, {"pos_embed": "none"}),
        (VIT, {"init_values": 0.5, "qk_norm": True}),
    ],
)
def test_without_rounding_it_is_timms_net(name, kwargs):
    net = placed(name, kwargs)
    with in_float(net):
        assert_close(logits(net), logits(vit(name, **kwargs)), rtol=1e-4, atol=1e-4)
    assert (logits(net) - logits(vit(name, **kwargs))).abs().max() > 1e-2


def test_the_net_stays_the_object_it_is_with_timms_names():
    net = vit(DISTILLED)
    names, weight = set(net.state_dict()), net.blocks[0].attn.qkv.weight
    assert qat.convert(net, PtqRecipe(), input_size=SIZE) is net
    assert isinstance(net, VisionTransformerDistilled)
    assert set(timm_state_dict(net)) == names
    assert net.blocks[0].attn.qkv.weight is weight


def test_integer_norms_work_on_the_scales_around_them():
    net = placed(layernorm="integer", residual_observer="ptf", bits=8)
    norms = {name: m for name, m in net.named_modules() if isinstance(m, IntegerLayerNorm)}
    assert set(norms) == {"norm", *(f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2))}
    around = {
        "blocks.0.norm1": (net.embedding_quantizer, net.blocks[0].attn.qkv.input_quantizer),
        "blocks.1.norm1": (
            net.blocks[0].residual2_quantizer,
            net.blocks[1].attn.qkv.input_quantizer,
        ),
        "blocks.1.norm2": (
            net.blocks[1].residual1_quantizer,
            net.blocks[1].mlp.fc1.input_quantizer,
        ),
        "norm": (net.blocks[1].residual2_quantizer, net.head.input_quantizer),
    }
    for name, (before, behind) in around.items():
        x = before(randn(2, 17, 32))
        expected = integer_layer_norm(
            x, before.scale, behind.scale, norms[name].weight, norms[name].bias
        )
        assert torch.equal(norms[name](x), expected)
    twin = copy.deepcopy(net)
    assert twin.norm.between[0] is twin.blocks[1].residual2_quantizer
    assert (logits(net) - logits(vit())).norm() < 0.3 * logits(vit()).norm()
