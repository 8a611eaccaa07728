"""Cosine attention. Oracle: timm's where nothing is rounded, the formula written out where something is."""

import math

import torch
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.nn.swinv2 import QuantCosineAttention
from tests.nets import ATTENTIONS, GENERIC
from tests.nn.shown import attend, heads, merged
from tests.tiny import randn

FAMILY = ATTENTIONS["swinv2"]


def test_normalised_then_quantized():
    attn = FAMILY.quantized("ofq_noqkr", bits=2).layers[0].blocks[0].attn
    assert isinstance(attn, QuantCosineAttention)
    x = randn(8, 16, 16)

    q, k, v = (attn.qkv(x) + torch.cat([attn.q_bias, torch.zeros(16), attn.v_bias])).chunk(3, -1)
    q, k = (merged(F.normalize(heads(t), dim=-1)) for t in (q, k))
    scores = heads(attn.q_quantizer(q)) @ heads(attn.k_quantizer(k)).transpose(-1, -2)
    scores = scores * attn.logit_scale.clamp(max=math.log(100)).exp()
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, 2)[
        attn.relative_position_index.flatten()
    ]
    scores = scores + 16 * table.view(16, 16, 2).permute(2, 0, 1).sigmoid()
    assert_close(attn(x), attend(attn, scores, v))


def test_the_net_that_makes_the_bias_stays_float():
    for family, part in ((FAMILY, "cpb_mlp"), (GENERIC["swinv2_cr"], "meta_mlp")):
        net = family.converted("ofq_noqkr")
        assert not [site.name for site in qat.iter_quantizers(net) if part in site.name]
        assert [name for name, _ in qat.conversion_report(net).stays_float if part in name]
