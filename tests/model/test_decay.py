"""Parameters without weight decay. Oracle: the groups of timm's own optimizers."""

import copy

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_weight_decay
from torch import nn

import qat
from tests.nets import FAMILIES
from tests.tiny import quantized


@pytest.fixture
def net():
    return quantized(bits=2)


def decayed(groups, net):
    """Names of the parameters in groups with decay."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def test_names_all_but_the_weights_of_layers(net):
    left = {name for name, _ in net.named_parameters()} - qat.no_weight_decay(net)
    layers = ("attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    weights = [f"{layer}.weight" for layer in layers] + ["attn.q_weight", "attn.k_weight"]
    blocks = {f"blocks.{i}.{name}" for i in range(2) for name in weights}
    assert left == {"patch_embed.proj.weight", "head.weight"} | blocks


@pytest.mark.parametrize("wrap", [lambda net: net, copy.deepcopy, torch.compile])
def test_timms_optimizers_find_it(net, wrap):
    net = wrap(net)
    wanted = {name for name, _ in net.named_parameters()} - qat.no_weight_decay(net)
    assert len(wanted) == 14
    optimizer = create_optimizer_v2(net, opt="adamw", lr=1e-3, weight_decay=0.05)
    assert decayed(optimizer.param_groups, net) == wanted
    groups = param_groups_weight_decay(net, 0.05, no_weight_decay_list=net.no_weight_decay())
    assert decayed(groups, net) == wanted


def test_in_a_module_of_ones_own_only_tokens_decay_besides_weights(net):
    """There timm asks nobody, and goes by the number of dimensions, as in float."""
    optimizer = create_optimizer_v2(nn.Sequential(net), opt="adamw", lr=1e-3, weight_decay=0.05)
    exempt = decayed(optimizer.param_groups, net) & qat.no_weight_decay(net)
    assert exempt == {"cls_token", "pos_embed"}


def test_deviates_from_reference_swins_table_does_not_decay():
    # There all tensors of two dimensions and more decay but tokens and the position embedding.
    net = FAMILIES["swin"].converted()
    names = [name for name, _ in net.named_parameters() if name.endswith("bias_table")]
    assert len(names) == 4
    assert set(names) <= qat.no_weight_decay(net)
