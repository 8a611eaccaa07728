"""Frozen nets. Oracle: the evaluation of the net that was frozen; where a code differs, that its value lay on a threshold."""

import copy

import pytest
import torch

import qat
from qat.functional.statsq import statsq_codes, statsq_scale
from qat.model.frozen import FrozenActivation, FrozenWeight, Product, noting, set_mode
from qat.model.frozen.agreement import agreement, compare, run_watched
from qat.nn.attention import QkrAttention
from tests import tiny
from tests.nets import FAMILIES, families

RECIPES = {
    "ofq_2bit": qat.recipe("ofq", bits=2),
    "ofq_3bit_fold": qat.recipe("ofq", bits=3, qk_bias="fold"),
    "ofq_noqkr_4bit": qat.recipe("ofq_noqkr", bits=4),
    "float_attention": qat.recipe("ofq", bits=2, attention="float"),
    "seq_2bit": qat.recipe("seq", bits=2),
    "statsq_rms_3bit": qat.recipe("seq", bits=3, weight_quantizer="statsq_rms", act_scales="tensor"),
    "lsq_4bit": qat.recipe("lsq", bits=4),
    "minmax_8bit": qat.recipe("minmax", bits=8),
    "weights_alone": qat.recipe("statsq", bits=2),
    "mixed": qat.recipe("ofq", bits=2, overrides={"blocks.0.mlp.*": {"bits": 4}, "blocks.1.attn": {"weight_quantizer": "float"}}),
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


@pytest.mark.parametrize("mode", ["float", "integer"])
@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_the_net(name, mode):
    net = made(RECIPES[name])
    before = copy.deepcopy(net.state_dict())
    found = agreement(net, qat.freeze(net, mode=mode), [tiny.images(16, seed) for seed in range(1, 4)])
    assert found.not_ties == []
    assert found.images == found.without_flip + found.flipped == 48
    assert found.ties == found.flipped < 10
    assert found.largest < 1e-5
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_every_family_is_frozen(name):
    family = FAMILIES[name]
    net = qat.convert(family.build(), qat.recipe("ofq", bits=2, attention=family.attention), input_size=family.input_size)
    trained(qat.initialize_scales(net, [family.images(8, 1)]))
    _check_both_modes(net, family)


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_every_family_is_frozen_behind_post_training_quantization(name):
    family = FAMILIES[name]
    recipe = qat.PtqRecipe(bits=4, act_bits=8, softmax_bits=4, softmax_quantizer="log2", bias_correction=True)
    net = qat.convert(family.build(), recipe, input_size=family.input_size)
    qat.ptq.calibrate(net, [family.images(8, 1)])
    _check_both_modes(net.eval(), family)


def _check_both_modes(net, family):
    frozen = qat.freeze(net)
    for form in (frozen, qat.freeze(net, mode="integer")):
        found = agreement(net, form, [family.images(8)])
        assert found.not_ties == []
        assert found.largest < 1e-5
    with noting() as products:
        qat.integer_forward(frozen, family.images(2))
    weights = [site.name for site in qat.iter_quantizers(frozen) if site.is_weight]
    assert {noted.product.right for noted in products} >= set(weights)
    assert all(noted.seen <= noted.product.largest < 2**31 for noted in products)


def test_weights_are_codes():
    net = made(RECIPES["ofq_2bit"])
    latents = {site.name: site.latent().detach() for site in qat.iter_quantizers(net) if site.is_weight}
    frozen = qat.freeze(net)
    held = tiny.sites(frozen)
    assert all(isinstance(held[name].quantizer, FrozenWeight) for name in latents)
    weight = latents["blocks.0.mlp.fc1.weight_quantizer"]
    quantizer = held["blocks.0.mlp.fc1.weight_quantizer"].quantizer
    assert torch.equal(quantizer.codes(), statsq_codes(weight, 2))
    assert torch.equal(quantizer.scale, (statsq_scale(weight) / 2).flatten())
    coded = set_mode(quantizer, "integer").held()
    set_mode(quantizer, "float")
    assert coded.codes.unique().tolist() == [-3, -1, 1, 3]
    assert torch.equal(coded.value(), quantizer())
    torch.testing.assert_close(quantizer(), tiny.sites(net)["blocks.0.mlp.fc1.weight_quantizer"].quantizer(weight), rtol=1e-6, atol=0)
    assert held["blocks.0.attn.qk_quantizer"].quantizer.codes().shape == (2 * 32, 32)


def test_nothing_of_the_float_weights_is_left():
    net = made(qat.recipe("ofq", bits=2, qk_bias="fold"))
    state = qat.freeze(net).state_dict()
    assert not [key for key in state if key.endswith(("q_weight", "k_weight", "q_bias", "fc1.weight", "v.weight", "head.weight"))]
    assert state["blocks.0.attn.folded_bias"].shape == (2, 32)
    floats = sum(value.numel() for key, value in state.items() if value.is_floating_point() and value.ndim > 1)
    assert floats < 2500  # class token, positions, the bias of queries, offsets of the image


def test_offsets_are_folded_where_that_is_exact():
    net = made(RECIPES["ofq_noqkr_4bit"])
    frozen = qat.freeze(net)
    held, were = tiny.sites(frozen), tiny.sites(net)
    fc1, its = net.blocks[0].mlp.fc1, were["blocks.0.mlp.fc1.input_quantizer"].quantizer
    assert held["blocks.0.mlp.fc1.input_quantizer"].quantizer.after is None
    torch.testing.assert_close(frozen.blocks[0].mlp.fc1.bias, fc1.bias + fc1.quantized("weight") @ its.offset_after)
    assert torch.equal(held["blocks.0.mlp.fc1.input_quantizer"].quantizer.before, its.offset_before)
    for i, role in enumerate("qkv"):
        assert held[f"blocks.0.attn.{role}_quantizer"].quantizer.before is None
        qkv, its = net.blocks[0].attn.qkv, were[f"blocks.0.attn.{role}_quantizer"].quantizer
        rows, behind = slice(32 * i, 32 * (i + 1)), were["blocks.0.attn.qkv.input_quantizer"].quantizer.offset_after
        expected = qkv.bias + qkv.quantized("weight") @ behind
        torch.testing.assert_close(frozen.blocks[0].attn.qkv.bias[rows], expected[rows] + its.offset_before)


def test_offsets_of_zero_are_dropped():
    net = qat.initialize_scales(qat.convert(tiny.vit(), RECIPES["ofq_2bit"], input_size=tiny.SIZE), [tiny.images()])
    frozen = qat.freeze(net)
    grids = [site.quantizer for site in qat.iter_quantizers(frozen) if isinstance(site.quantizer, FrozenActivation)]
    assert grids
    assert all(grid.before is None and grid.after is None for grid in grids)


def test_products_are_those_of_the_net_on_codes():
    frozen = qat.freeze(made(RECIPES["ofq_2bit"]))
    with noting() as products:
        out = qat.integer_forward(frozen, tiny.images(2))
    assert out.dtype == torch.float32
    names = [(noted.product.left, noted.product.right) for noted in products]
    assert names[1:6] == [
        ("blocks.0.attn.input_quantizer", "blocks.0.attn.qk_quantizer"),
        ("blocks.0.attn.input_quantizer", "blocks.0.attn.k_quantizer"),
        ("blocks.0.attn.input_quantizer", "blocks.0.attn.v.weight_quantizer"),
        ("blocks.0.attn.probs_quantizer", "blocks.0.attn.v_quantizer"),
        ("blocks.0.attn.proj.input_quantizer", "blocks.0.attn.proj.weight_quantizer"),
    ]
    # 32 terms, codes -2 .. 1 times the odd numbers -3 .. 3.
    assert products[1].product == Product(*names[1], 32, 2, 3)
    assert products[1].product.bits == 9
    assert isinstance(frozen.blocks[0].attn, QkrAttention)
    assert frozen(tiny.images(2)).dtype == torch.float32  # the mode is back to what it was


def test_what_cannot_be_frozen_is_refused():
    with pytest.raises(qat.UsageError, match="freeze: the net is in float"):
        qat.freeze(tiny.vit())
    with pytest.raises(qat.UsageError, match="scales of patch_embed.proj.input_quantizer are not initialised"):
        qat.freeze(tiny.converted())
    net = made(RECIPES["ofq_2bit"])
    with pytest.raises(qat.UsageError, match="mode='int8': must be one of float, integer"):
        qat.freeze(net, mode="int8")
    with pytest.raises(qat.UsageError, match="freeze: the net is frozen already"):
        qat.freeze(qat.freeze(net))
    present = tiny.quantized("ofq_noqkr", act_quantizer="statsq")
    with pytest.raises(qat.UsageError, match="patch_embed.proj.input_quantizer is quantized by statsq, whose values have no fixed grid"):
        qat.freeze(present)


def test_a_code_that_differs_away_from_a_threshold_is_called_by_name():
    net = made(RECIPES["lsq_4bit"])
    frozen = qat.freeze(net)
    frozen.blocks[0].norm2.bias.data += 0.3
    found = agreement(net, frozen, [tiny.images(8, 1)])
    assert set(found.not_ties) == {"blocks.0.mlp.fc1.input_quantizer"}
    assert found.flipped == 8 > found.ties


def test_a_tie_in_what_all_images_share_is_one_of_each_image():
    net = qat.convert(tiny.vit(depth=1), qat.PtqRecipe(), input_size=tiny.SIZE)
    qat.ptq.calibrate(net, [tiny.images()])
    frozen, x = qat.freeze(net.eval()), tiny.images(3)
    (logits, seen), theirs = run_watched(frozen, x), run_watched(net, x)
    shared, behind = seen["positions_quantizer"], seen["embedding_quantizer"]
    assert len(shared.codes) == 1
    middle = (frozen.positions_quantizer.qmin + frozen.positions_quantizer.qmax) // 2
    shared.codes[0, 0, 0] += 1 if shared.codes[0, 0, 0] < middle else -1
    seen["embedding_quantizer"] = behind._replace(value=behind.value.flip(1), codes=behind.codes.flip(1))
    found = compare(frozen, theirs, (logits, seen))
    assert (found.flipped, found.ties, found.not_ties) == (3, 3, [])


def test_a_net_in_bfloat16_is_frozen_in_float32(tmp_path):
    images = tiny.images(4).bfloat16()
    net = qat.convert(tiny.vit().bfloat16(), qat.recipe("deploy_w8a8"), input_size=tiny.SIZE)
    qat.initialize_scales(net, [images]).eval()
    frozen, whole = qat.freeze(net), qat.freeze(copy.deepcopy(net).float())
    assert torch.equal(frozen(images.float()), whole(images.float()))
    torch.testing.assert_close(qat.integer_forward(net, images.float()), frozen(images.float()), rtol=1e-5, atol=1e-5)
    assert qat.export_onnx(net, tmp_path / "net.onnx").problem is None
    assert next(net.parameters()).dtype == torch.bfloat16


def test_powers_of_two_too_far_apart_for_int32_are_refused():
    recipe = qat.PtqRecipe(softmax_quantizer="log2", softmax_bits=5, placement="inputs")
    net = qat.convert(tiny.vit(depth=1), recipe, input_size=tiny.SIZE)
    qat.ptq.calibrate(net, [tiny.images()])
    with pytest.raises(qat.UsageError, match=r"probs_quantizer: its values are no integers of 32 bits: .* must be fewer bits"):
        qat.integer_forward(net, tiny.images())
