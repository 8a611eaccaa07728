"""What weight decay leaves alone. Oracle: the groups of timm's own optimizers."""

import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_weight_decay

import qat


def tiny():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=24,
        depth=1,
        num_heads=3,
        num_classes=3,
    )


@pytest.fixture
def net():
    made = qat.convert(tiny(), qat.recipe("ofq", bits=2), input_size=(3, 16, 16))
    return qat.initialize_scales(made, [torch.randn(4, 3, 16, 16)])


def decayed(groups, net):
    """Names of the parameters in groups with decay."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def test_names_all_but_the_weights_of_layers(net):
    left = {name for name, _ in net.named_parameters()} - qat.no_weight_decay(net)
    assert left == {
        *(
            "patch_embed.proj.weight",
            "head.weight",
            "blocks.0.mlp.fc1.weight",
            "blocks.0.mlp.fc2.weight",
        ),
        *(
            "blocks.0.attn.q_weight",
            "blocks.0.attn.k_weight",
            "blocks.0.attn.v.weight",
            "blocks.0.attn.proj.weight",
        ),
    }


@pytest.mark.parametrize("copied", [False, True])
def test_timms_optimizers_find_it(net, copied):
    net = copy.deepcopy(net) if copied else net
    wanted = {name for name, _ in net.named_parameters()} - qat.no_weight_decay(net)
    assert (
        decayed(create_optimizer_v2(net, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups, net)
        == wanted
    )
    assert (
        decayed(
            param_groups_weight_decay(net, 0.05, no_weight_decay_list=net.no_weight_decay()), net
        )
        == wanted
    )


def test_it_is_found_in_a_compiled_net(net):
    compiled = torch.compile(net)
    wanted = {name for name, _ in compiled.named_parameters()} - qat.no_weight_decay(compiled)
    assert len(wanted) == 8
    assert (
        decayed(
            create_optimizer_v2(compiled, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups,
            compiled,
        )
        == wanted
    )
