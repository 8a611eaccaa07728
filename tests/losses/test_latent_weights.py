"""Which weights a term acts on. Oracle: the names of a small net's layers."""

import pytest
import torch

import qat
from qat.losses.latent_weights import find_latent_weights
from tests.tiny import quantized, vit

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
QKR = ("attn.qk", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


def names(net, *args, **kwargs):
    found = find_latent_weights(net, "setting", *args, **kwargs)
    return [one.layer if one.parameter == "weight" else f"{one.layer}.{one.parameter or one.role}" for one in found]


def in_blocks(*layers):
    return [f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers]


@pytest.mark.parametrize(("preset", "layers"), [("fp", LAYERS), ("lsq", LAYERS), ("ofq_noqkr", LAYERS), ("minmax", LAYERS), ("ofq", QKR)])
def test_all_but_stem_and_head(preset, layers):
    net = vit() if preset == "fp" else quantized(preset)
    assert sorted(names(net)) == sorted(in_blocks(*layers))


@pytest.mark.parametrize(("qk", "tensors"), [("product", ["qk"]), ("factors", ["q_weight", "k_weight"])])
def test_query_and_key_weights(qk, tensors):
    net = quantized("ofq")
    found = [one for one in find_latent_weights(net, "setting", qk) if one.role == "qk"]
    assert [f"{one.layer}.{one.parameter or one.role}" for one in found] == in_blocks(*(f"attn.{tensor}" for tensor in tensors))
    attention = net.blocks[0].attn
    expected = {"qk": attention.latent("qk"), "q_weight": attention.q_weight, "k_weight": attention.k_weight}
    assert all(torch.equal(master.of(net), expected[tensor]) for master, tensor in zip(found, tensors, strict=False))


def test_a_layer_that_is_there_twice_counts_once():
    net = vit()
    net.blocks[1].mlp = net.blocks[0].mlp
    assert len(names(net)) == 6
    net = vit()
    net.blocks[1].mlp.fc1.weight = net.blocks[0].mlp.fc1.weight
    assert len(names(net)) == 7


def test_nothing_to_act_on():
    with pytest.raises(qat.UsageError, match=r"loss.kure=1: this net has no Linears or convolutions beside stem and heads"):
        find_latent_weights(torch.nn.Sequential(torch.nn.LayerNorm(3)), "loss.kure=1")


def test_convolutions_of_a_net_are_found_but_the_first():
    import timm

    net = timm.create_model("resnet18", num_classes=10)
    found = find_latent_weights(net, "setting")
    assert len(found) == 19, "torchvision's ResNet-18 has 20 convolutions; the paper's code regularizes 19"
    assert all(master.of(net).ndim == 4 for master in found)
