"""Whole nets by fused Functions. Oracle: the same nets by Functions of one quantizer each."""

import pytest
import timm
import torch
from torch.testing import assert_close

import qat
from qat.kernels.fused import heads
from qat.nn import attention, linear, qkr_attention
from tests.nets import FAMILIES
from tests.tiny import fitted, identical, images, kept_bytes, quantized

NETS = [FAMILIES[name] for name in ("vit", "deit", "swin")]


@pytest.fixture
def unfused(monkeypatch):
    """A function that switches fusing off."""

    def switch():
        for module in (attention, linear, qkr_attention):
            monkeypatch.setattr(module, "can_fuse", lambda x: False)

    return switch


def step(net, x):
    net.zero_grad()
    torch.manual_seed(0)  # paths are dropped at random
    out = net.train()(x)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def same(ours, theirs):
    logits, gradients = ours
    assert torch.equal(logits, theirs[0])
    assert gradients.keys() == theirs[1].keys()
    for name, gradient in gradients.items():
        atol = 1e-5 * gradient.abs().max().item() + 1e-7
        assert_close(gradient, theirs[1][name], rtol=1e-3, atol=atol, msg=name)


KINDS = {
    "qkr": ("ofq", {}),
    "fold": ("ofq", {"qk_bias": "fold"}),
    "standard": ("ofq", {"attention": "standard"}),
    "float": ("ofq", {"attention": "float"}),
    "seq": ("seq", {}),
    "seq qkr": ("seq", {"attention": "qkr"}),
    "lsq": ("lsq", {}),
    "lsq absolute": ("lsq", {"steps": "absolute", "attention": "float"}),
    "deploy_w4a4": ("deploy_w4a4", {}),
    "without biases": ("ofq", {}),
    "frozen weights": ("seq", {}),
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NETS, ids=lambda f: f.name)
@pytest.mark.parametrize("rows", [1, 8], ids=["as on a CPU", "as on a GPU"])
def test_nets_are_the_same(rows, family, kind, unfused, monkeypatch):
    """Rows of scores are a multiple of these many on a GPU."""
    if rows > 1:
        monkeypatch.setitem(heads.ROW_MULTIPLES, "cpu", rows)
    name, knobs = KINDS[kind]
    recipe = qat.recipe(name, bits=2, **knobs)
    if recipe.attention == "qkr" and not family.qkr:
        pytest.skip("no single matrix M")
    net = family.build(qkv_bias=kind != "without biases")
    x = family.images(4)
    fitted(net, x, recipe)
    for site in qat.iter_quantizers(net):
        if site.role == "weight":
            site.owner.weight.requires_grad = kind != "frozen weights"
    fused = step(net, x)
    recomputed = step(qat.set_execution(net, memory="recompute"), x)
    assert torch.equal(fused[0], recomputed[0])
    assert identical(fused[1], recomputed[1])
    unfused()
    same(fused, step(net, x))


@pytest.mark.parametrize("recipe", ["deploy_w4a4", "lsq", "seq"])
def test_a_net_may_write_into_what_a_layer_gave(recipe, unfused):
    """NaFlexViT adds its positions in place to what its first Linear gave."""
    net = timm.create_model(
        "naflexvit_base_patch16_gap", embed_dim=48, depth=1, num_heads=3, num_classes=10
    )
    x = torch.randn(2, 3, 64, 64)
    fitted(net, x, recipe, bits=4)
    fused = step(net, x)
    unfused()
    same(fused, step(net, x))


def deit(knobs, depth, x, recipe="ofq", memory="save"):
    torch.manual_seed(0)
    net = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=10, depth=depth)
    if knobs is not None:
        fitted(net, x, recipe, bits=2, **knobs)
    return qat.set_execution(net, memory=memory).train()


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ["ofq", "lsq", "seq"])
@pytest.mark.parametrize(
    ("attention", "memory", "most"),
    [
        ("float", "save", 0.65),
        ("standard", "save", 0.70),
        ("qkr", "save", 0.80),
        ("qkr", "recompute", 0.55),
    ],
)
def test_a_quantized_block_keeps_less_than_a_float_block(attention, memory, most, recipe):
    """Neither is any quantized weight among it, as large as what a block of these few tokens may keep; only the folded matrix, in float."""
    x, folded = torch.randn(4, 3, 64, 64), 4 * 3 * 192 * 192 if attention == "qkr" else 0

    def of_a_block(knobs):
        nets = (deit(knobs, n, x, recipe, memory) for n in (2, 1))
        two, one = (kept_bytes(lambda net=net: net(x), net.parameters())[0] for net in nets)
        return two - one

    assert of_a_block({"attention": attention}) - folded < most * of_a_block(None)


def test_blocks_may_be_run_again_instead_of_kept():
    x, grads = images(), []
    for again in (False, True):
        net = quantized().train()
        net.set_grad_checkpointing(again)
        grads.append(step(net, x))
    same(*grads)


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        ("standard", "attn_drop"),
        ("standard", "q_norm"),
        ("qkr", "attn_drop"),
        ("qkr", "v.input_quantizer"),
    ],
)
def test_a_hook_is_called_in_a_fused_attention_too(attention, name):
    net, seen = quantized(attention=attention), []
    net.get_submodule(f"blocks.0.attn.{name}").register_forward_hook(lambda *_: seen.append(name))
    net(images())
    assert seen == [name]


@pytest.mark.parametrize("name", ["norm1", "norm2", "mlp.act"])
def test_what_a_hook_was_given_can_be_differentiated_by(name, unfused):
    net, seen, found = quantized(attention="standard").train(), [], []
    net.get_submodule(f"blocks.0.{name}").register_forward_hook(
        lambda m, given, out: seen.append(out)
    )
    for switch in (lambda: None, unfused):
        switch()
        out = net(images()).square().sum()
        found.append(torch.autograd.grad(out, seen[-1])[0])
    assert found[1].abs().sum() > 0
    assert_close(*found)


def nodes(out):
    """Names of the nodes of a graph."""
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [node.name() for node in seen]


@pytest.mark.parametrize(
    ("preset", "knobs", "weights"),
    [
        ("ofq_noqkr", {}, 0),
        ("ofq_noqkr", {"offsets": False}, 0),
        ("ofq_noqkr", {"act_scales": "tensor"}, 0),
        ("lsq", {}, 8),
        ("seq", {}, 8),
        ("deploy_w4a4", {}, 8),
    ],
)
def test_every_recipe_takes_the_fused_path(preset, knobs, weights):
    """Two blocks: four Linears and an attention each; single quantizers are left for learned weights, and for stem and head."""
    found = nodes(quantized(preset, bits=2, **knobs).train()(images()))
    assert found.count("_LsqLinearBackward") >= 8
    assert found.count("_AttentionBackward") == 2
    assert found.count("_LSQBackward") - weights <= 4
    assert not any(name in {"SoftmaxBackward0", "BmmBackward0"} for name in found)
