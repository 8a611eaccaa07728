"""How quantizers are found. Oracle: the list written out for both forms of attention."""

import pytest
import torch

import qat
from qat import functional as F
from tests.tiny import converted, sites

STEM = [
    ("patch_embed.proj.input_quantizer", "image"),
    ("patch_embed.proj.weight_quantizer", "weight"),
]
MLP = [
    ("mlp.fc1.input_quantizer", "input"),
    ("mlp.fc1.weight_quantizer", "weight"),
    ("mlp.fc2.input_quantizer", "input"),
    ("mlp.fc2.weight_quantizer", "weight"),
]
PROJ = [("attn.proj.input_quantizer", "input"), ("attn.proj.weight_quantizer", "weight")]
ATTENTION = {
    "qkr": [
        ("attn.input_quantizer", "input"),
        ("attn.qk_quantizer", "qk"),
        ("attn.k_quantizer", "k"),
        ("attn.v.weight_quantizer", "weight"),
        ("attn.v_quantizer", "v"),
        ("attn.probs_quantizer", "probs"),
        *PROJ,
    ],
    "standard": [
        ("attn.qkv.input_quantizer", "input"),
        ("attn.qkv.weight_quantizer", "weight"),
        ("attn.q_quantizer", "q"),
        ("attn.k_quantizer", "k"),
        ("attn.v_quantizer", "v"),
        ("attn.probs_quantizer", "probs"),
        *PROJ,
    ],
    "float": [
        ("attn.qkv.input_quantizer", "input"),
        ("attn.qkv.weight_quantizer", "weight"),
        *PROJ,
    ],
}


HEAD = [("head.input_quantizer", "input"), ("head.weight_quantizer", "weight")]


@pytest.mark.parametrize("attention", ATTENTION)
def test_names_and_roles(attention):
    net = converted(attention=attention)
    found = [(site.name, site.role) for site in qat.iter_quantizers(net)]
    blocks = [
        (f"blocks.{i}.{name}", role) for i in range(2) for name, role in ATTENTION[attention] + MLP
    ]
    assert sorted(found) == sorted(STEM + blocks + HEAD)
    for site in qat.iter_quantizers(net):
        assert net.get_submodule(site.name) is site.quantizer
        assert net.get_submodule(site.name.rpartition(".")[0]) is site.owner
        assert site.is_weight == (site.role in {"weight", "qk"})


def test_latents_are_the_float_weights():
    net = converted()
    for site in qat.iter_quantizers(net):
        if site.role == "weight":
            assert site.latent() is site.owner.weight
    qk = sites(net)["blocks.1.attn.qk_quantizer"]
    assert torch.equal(qk.latent(), F.fold_qk(qk.owner.q_weight, qk.owner.k_weight, 2))
