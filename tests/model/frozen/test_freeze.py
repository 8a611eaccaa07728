"""Frozen nets. Oracle: the evaluation of the net that was frozen; where a code differs, that its value lay on a threshold."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.utils import parametrizations, prune

import qat
from qat.export.check import compare, net_codes
from qat.functional.statsq import statsq_codes, statsq_scale
from qat.model.frozen import FrozenWeight
from tests import tiny
from tests.nets import FAMILIES, families

RECIPES = {
    "ofq_2bit": qat.recipe("ofq", bits=2),
    "ofq_3bit_fold": qat.recipe("ofq", bits=3, qk_bias="fold"),
    "ofq_noqkr_4bit": qat.recipe("ofq_noqkr", bits=4),
    "float_attention": qat.recipe("ofq", bits=2, attention="float"),
    "seq_2bit": qat.recipe("seq", bits=2),
    "statsq_rms_3bit": qat.recipe(
        "seq", bits=3, weight_quantizer="statsq_rms", act_scales="tensor"
    ),
    "dorefa_3bit": qat.recipe("lsq", bits=3, weight_quantizer="dorefa"),
    "lsq_4bit": qat.recipe("lsq", bits=4),
    "minmax_8bit": qat.recipe("minmax", bits=8),
    "weights_alone": qat.recipe("statsq", bits=2),
    "mixed": qat.recipe(
        "ofq",
        bits=2,
        overrides={"blocks.0.mlp.*": {"bits": 4}, "blocks.1.attn": {"weight_quantizer": "float"}},
    ),
}


def trained(net):
    """As after training: no offset is zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in net.named_parameters():
        if "offset" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def made(recipe):
    net = qat.convert(tiny.vit(), recipe, input_size=tiny.SIZE)
    return trained(qat.initialize_scales(net, [tiny.images()]))


def assert_agrees(net, batches):
    frozen = qat.freeze(net)
    found = compare(net, frozen, lambda: partial(net_codes, frozen), batches)
    assert (found.problem, found.unlike) == (None, 0)
    assert found.largest < 5e-5
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_the_net(name):
    net = made(RECIPES[name])
    before = copy.deepcopy(net.state_dict())
    found = assert_agrees(net, [tiny.images(16, seed) for seed in range(1, 4)])
    assert (found.images, found.other_logits < 10) == (48, True)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["train", "ptq"])
@pytest.mark.parametrize("name", families())
def test_every_family_is_frozen(name, method):
    family = FAMILIES[name]
    if method == "train":
        net = qat.convert(
            family.build(),
            qat.recipe("ofq", bits=2, attention=family.attention),
            input_size=family.input_size,
        )
        trained(qat.initialize_scales(net, [family.images(8, 1)]))
    else:
        recipe = qat.PtqRecipe(
            bits=4, act_bits=8, softmax_bits=4, softmax_quantizer="log2", bias_correction=True
        )
        net = qat.convert(family.build(), recipe, input_size=family.input_size)
        qat.ptq.calibrate(net, [family.images(8, 1)])
    # One by one: a convolution of several images may sum in another order, and a value on a threshold takes another code.
    assert_agrees(net.eval(), family.images(8).split(1))


def test_weights_are_codes():
    net = made(RECIPES["ofq_2bit"])
    latents = {
        site.name: site.latent().detach() for site in qat.iter_quantizers(net) if site.is_weight
    }
    frozen = qat.freeze(net)
    held = tiny.sites(frozen)
    assert all(isinstance(held[name].quantizer, FrozenWeight) for name in latents)
    weight = latents["blocks.0.mlp.fc1.weight_quantizer"]
    quantizer = held["blocks.0.mlp.fc1.weight_quantizer"].quantizer
    assert torch.equal(quantizer.codes(), statsq_codes(weight, 2))
    assert torch.equal(quantizer.scale, (statsq_scale(weight) / 2).flatten())
    torch.testing.assert_close(
        quantizer(),
        tiny.sites(net)["blocks.0.mlp.fc1.weight_quantizer"].quantizer(weight),
        rtol=1e-6,
        atol=0,
    )
    assert held["blocks.0.attn.qk_quantizer"].quantizer.codes().shape == (2 * 32, 32)


def test_offsets_are_folded_where_that_is_exact():
    net = made(RECIPES["ofq_noqkr_4bit"])
    frozen = qat.freeze(net)
    held, were = tiny.sites(frozen), tiny.sites(net)
    fc1, its = net.blocks[0].mlp.fc1, were["blocks.0.mlp.fc1.input_quantizer"].quantizer
    assert held["blocks.0.mlp.fc1.input_quantizer"].quantizer.after is None
    torch.testing.assert_close(
        frozen.blocks[0].mlp.fc1.bias, fc1.bias + fc1.quantized("weight") @ its.offset_after
    )
    assert torch.equal(held["blocks.0.mlp.fc1.input_quantizer"].quantizer.before, its.offset_before)
    for i, role in enumerate("qkv"):
        assert held[f"blocks.0.attn.{role}_quantizer"].quantizer.before is None
        qkv, its = net.blocks[0].attn.qkv, were[f"blocks.0.attn.{role}_quantizer"].quantizer
        rows, behind = (
            slice(32 * i, 32 * (i + 1)),
            were["blocks.0.attn.qkv.input_quantizer"].quantizer.offset_after,
        )
        expected = qkv.bias + qkv.quantized("weight") @ behind
        torch.testing.assert_close(
            frozen.blocks[0].attn.qkv.bias[rows], expected[rows] + its.offset_before
        )


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(qat.UsageError, match="freeze: the model is not quantized"):
        qat.freeze(tiny.vit())
    with pytest.raises(
        qat.UsageError, match="scales of patch_embed.proj.input_quantizer are not initialised"
    ):
        qat.freeze(tiny.converted())
    net = made(RECIPES["ofq_2bit"])
    with pytest.raises(qat.UsageError, match="freeze: the model is already frozen"):
        qat.freeze(qat.freeze(net))
    present = tiny.quantized("ofq_noqkr", act_quantizer="statsq")
    with pytest.raises(
        qat.UsageError,
        match="patch_embed.proj.input_quantizer is quantized by statsq, whose values have no fixed grid",
    ):
        qat.freeze(present)


@pytest.mark.parametrize("recipe", ["ofq_2bit", "lsq_4bit"])
@pytest.mark.parametrize(
    "change", [parametrizations.weight_norm, partial(prune.l1_unstructured, amount=0.5)]
)
def test_weights_that_are_made_from_others_are_refused(recipe, change, tmp_path):
    net = made(RECIPES[recipe])
    layer, name = (
        ("blocks.0.attn", "q_weight") if recipe == "ofq_2bit" else ("blocks.0.mlp.fc1", "weight")
    )
    change(net.get_submodule(layer), name)
    with pytest.raises(
        qat.UsageError,
        match=rf"^freeze: {layer} is pruned or parametrized; must have plain weights",
    ):
        qat.freeze(net)
    with pytest.raises(
        qat.UsageError, match="^save: the net is pruned or parametrized; must have plain weights"
    ):
        qat.save(net, tmp_path / "net.pt")
    assert not (tmp_path / "net.pt").exists()


def test_a_net_in_bfloat16_is_frozen_in_float32():
    images = tiny.images(4).bfloat16()
    net = qat.convert(tiny.vit().bfloat16(), qat.recipe("deploy_w8a8"), input_size=tiny.SIZE)
    qat.initialize_scales(net, [images]).eval()
    frozen, whole = qat.freeze(net), qat.freeze(copy.deepcopy(net).float())
    assert torch.equal(frozen(images.float()), whole(images.float()))
    assert next(net.parameters()).dtype == torch.bfloat16
