"""Frozen nets. Oracle: the evaluation of the net that was frozen; where a code differs, that its value lay on a threshold."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import qat
from qat.export.check import compare, outputs_and_codes
from qat.functional.statsq import statsq_codes, statsq_scale
from qat.model.frozen import FrozenWeight
from tests import tiny
from tests.errors import usage_error
from tests.nets import FAMILIES, families
from tests.tiny import identical

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
    net = tiny.convert(tiny.vit(), recipe)
    return trained(tiny.with_scales(net))


def assert_agrees(net, batches):
    frozen = qat.freeze(net)
    found = compare(net, frozen, lambda: partial(outputs_and_codes, frozen), batches)
    assert (found.problem, found.num_unexplained) == (None, 0)
    assert found.max_error < 5e-5
    return found


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_the_net(name):
    net = made(RECIPES[name])
    before = copy.deepcopy(net.state_dict())
    found = assert_agrees(net, [tiny.images(16, seed) for seed in range(1, 4)])
    assert (found.images, found.num_differing < 10) == (48, True)
    assert identical(before, net.state_dict())


@pytest.mark.sample(4)
@pytest.mark.slow
@pytest.mark.parametrize("method", ["train", "ptq"])
@pytest.mark.parametrize("name", families())
def test_every_family_is_frozen(name, method):
    family = FAMILIES[name]
    recipe = qat.recipe("ofq", bits=2, attention=family.attention)
    if method == "ptq":
        recipe = qat.PtqRecipe(
            bits=4, act_bits=8, softmax_bits=4, softmax_quantizer="log2", bias_correction=True
        )
    net = trained(tiny.fitted(family.build(), family.images(8, 1), recipe))
    # One by one: a convolution of several images may sum in another order, and a value on a threshold takes another code.
    assert_agrees(net, family.images(8).split(1))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_deviates_from_reference_weights_can_be_rebuilt_from_codes(bits):
    # There the scale is in no checkpoint and codes are nowhere to be had.
    net = made(qat.recipe("ofq", bits=bits))
    frozen = tiny.sites(qat.freeze(net))
    name = "blocks.0.mlp.fc1.weight_quantizer"
    site = tiny.sites(net)[name]
    weight = site.latent().detach()
    quantizer = frozen[name].quantizer
    codes = quantizer.codes()
    assert torch.equal(codes, statsq_codes(weight, bits))
    assert torch.equal(codes, site.quantizer.codes(weight))
    assert (codes.min(), codes.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(quantizer.scale, (statsq_scale(weight) / 2 ** (bits - 1)).flatten())
    rebuilt = (2 * codes + 1) * site.quantizer.scale_of(weight) / 2**bits
    for found in (quantizer(), rebuilt):
        assert_close(found, site.quantizer(weight), rtol=1e-6, atol=0)
    assert frozen["blocks.0.attn.qk_quantizer"].quantizer.codes().shape == (2 * 32, 32)
    for name, site in frozen.items():
        assert site.is_weight == isinstance(site.quantizer, FrozenWeight), name


def test_offsets_are_folded_where_that_is_exact():
    net = made(RECIPES["ofq_noqkr_4bit"])
    frozen = qat.freeze(net)
    held, were = (
        {name: site.quantizer for name, site in tiny.sites(model).items()}
        for model in (frozen, net)
    )
    name = "blocks.0.mlp.fc1"
    layer, offsets = net.get_submodule(name), were[f"{name}.input_quantizer"]
    assert held[f"{name}.input_quantizer"].after is None
    assert torch.equal(held[f"{name}.input_quantizer"].before, offsets.offset_before)
    expected = layer.bias + layer.quantized_weight("weight") @ offsets.offset_after
    assert_close(frozen.get_submodule(name).bias, expected)
    qkv, behind = net.blocks[0].attn.qkv, were["blocks.0.attn.qkv.input_quantizer"].offset_after
    expected = (qkv.bias + qkv.quantized_weight("weight") @ behind).chunk(3)
    biases = frozen.blocks[0].attn.qkv.bias.chunk(3)
    for i, role in enumerate("qkv"):
        name = f"blocks.0.attn.{role}_quantizer"
        assert held[name].before is None
        assert_close(biases[i], expected[i] + were[name].offset_before)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (tiny.vit, "^freeze: the model is not quantized"),
        (tiny.converted, "scales of patch_embed.proj.input_quantizer are not initialized"),
        (lambda: qat.freeze(tiny.quantized()), "^freeze: the model is already frozen"),
        (
            lambda: tiny.quantized("ofq_noqkr", act_quantizer="statsq"),
            "patch_embed.proj.input_quantizer uses quantizer statsq",
        ),
    ],
    ids=["float", "without scales", "frozen", "no grid"],
)
def test_what_cannot_be_frozen_is_refused(net, message):
    with usage_error(message):
        qat.freeze(net())


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
    with usage_error(rf"^freeze: {layer} is pruned or parametrized"):
        qat.freeze(net)
    with usage_error("^save: the model is pruned or parametrized"):
        qat.save(net, tmp_path / "net.pt")
    assert not (tmp_path / "net.pt").exists()


def test_a_net_in_bfloat16_is_frozen_in_float32():
    images = tiny.images(4).bfloat16()
    net = tiny.fitted(tiny.vit().bfloat16(), images, "deploy_w8a8")
    frozen, whole = qat.freeze(net), qat.freeze(copy.deepcopy(net).float())
    assert torch.equal(frozen(images.float()), whole(images.float()))
    assert next(net.parameters()).dtype == torch.bfloat16
