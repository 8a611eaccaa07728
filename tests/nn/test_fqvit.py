"""Quantizers behind layers. Oracle: names written out, and timm's own net; FQ-ViT's outputs are in tests/ptq."""

import copy

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch.testing import assert_close

import qat
from qat.functional import integer_layer_norm
from qat.model.ptq_spec import PtqRecipe
from qat.model.transfer import timm_state_dict
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq import in_float
from tests.errors import usage_error
from tests.tiny import DISTILLED, SIZE, VIT, fitted, images, logits, randn, sites, vit


def placed(name=VIT, kwargs=None, **knobs):
    return fitted(vit(name, **(kwargs or {})), images(), PtqRecipe(**{"bits": 4, **knobs}))


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


def test_a_distilled_net_has_quantizers_around_its_second_head_too():
    names, plain = (set(sites(placed(name))) for name in (DISTILLED, VIT))
    parts = ("input", "weight", "output")
    assert names - plain == {f"head_dist.{part}_quantizer" for part in parts}


def test_the_net_stays_the_object_it_is_with_timms_names():
    net = vit(DISTILLED)
    names, weight = set(net.state_dict()), net.blocks[0].attn.qkv.weight
    assert qat.convert(net, PtqRecipe(), input_size=SIZE) is net
    assert isinstance(net, VisionTransformerDistilled)
    assert set(timm_state_dict(net)) == names
    assert net.blocks[0].attn.qkv.weight is weight


def test_integer_norms_need_affine_grids_only_around_them():
    rules = {"*.mlp.fc2": {"act_quantizer": "float"}}
    settings = {"layernorm": "integer", "residual_observer": "ptf", "bits": 8}
    assert logits(placed(**settings, overrides=rules)).isfinite().all()
    with usage_error("layernorm"):
        placed(**settings, act_quantizer="float")


def test_integer_norms_work_on_the_scales_around_them():
    net = placed(layernorm="integer", residual_observer="ptf", bits=8)
    norms = {name: m for name, m in net.named_modules() if isinstance(m, IntegerLayerNorm)}
    assert set(norms) == {"norm", *(f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2))}
    first, last = net.blocks
    around = {
        "blocks.0.norm1": (net.embedding_quantizer, first.attn.qkv.input_quantizer),
        "blocks.1.norm1": (first.residual2_quantizer, last.attn.qkv.input_quantizer),
        "blocks.1.norm2": (last.residual1_quantizer, last.mlp.fc1.input_quantizer),
        "norm": (last.residual2_quantizer, net.head.input_quantizer),
    }
    for name, (before, behind) in around.items():
        x = before(randn(2, 17, 32))
        expected = integer_layer_norm(
            x, before.scale, behind.scale, norms[name].weight, norms[name].bias
        )
        assert torch.equal(norms[name](x), expected)
    twin = copy.deepcopy(net)
    assert twin.norm.outer_quantizers[0] is twin.blocks[1].residual2_quantizer
    assert (logits(net) - logits(vit())).norm() < 0.3 * logits(vit()).norm()
