"""A net in parts. Oracle: nets made by hand: quantizers taken out, or converted and loaded with other bits."""

import copy

import pytest
import timm
import torch
from torch import nn

import qat
from qat.analysis.sensitivity.parts import Part, take_apart
from qat.model.convert import conversion_of
from qat.model.ptq_spec import PtqRecipe
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq import calibrate
from qat.ptq.calibrate import in_float
from qat.quantizers.float import Float
from tests import tiny
from tests.analysis.common import PTQ, QAT, is_as_before, net_of, ptq, state


def without_quantizers(net, names):
    """A copy in which the quantizers of these names leave all as it is."""
    net = copy.deepcopy(net)
    for site in list(qat.iter_quantizers(net)):
        if site.name in names:
            setattr(site.owner, site.name.rpartition(".")[2], Float(site.quantizer.spec))
    return net


def names_of(net):
    return {site.name for site in qat.iter_quantizers(net)}


def resnet(**knobs):
    torch.manual_seed(0)
    net = tiny.shake(timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], in_chans=1, num_classes=10, output_stride=8))
    qat.convert(net, PtqRecipe(**{"bits": 4, "placement": "inputs", **knobs}), input_size=tiny.SIZE)
    calibrate(net, [tiny.images(seed=1)])
    return net.eval()


@pytest.mark.parametrize("kind", ["ofq2", "statsq", "ptq4"])
def test_every_quantizer_is_in_one_part(kind):
    net = net_of(kind)
    rounding = [site.name for site in qat.iter_quantizers(net) if site.quantizer.spec.quantizer != "float"]
    for by in ("site", "module", "block"):
        found = [site.name for part in take_apart(net, tiny.SIZE, by).parts for site in part.sites]
        assert sorted(found) == sorted(rounding)


def test_parts_have_the_names_of_what_they_are():
    names = {by: [part.name for part in take_apart(net_of("ofq2"), tiny.SIZE, by).parts] for by in ("site", "module", "block")}
    assert names["block"] == ["patch_embed.proj", "blocks.0", "blocks.1", "head"]
    assert {"blocks.0.attn", "blocks.0.attn.v", "blocks.0.attn.proj", "blocks.0.mlp.fc1"} <= set(names["module"])
    assert {"blocks.0.attn.qk_quantizer", "blocks.0.attn.v.weight_quantizer"} <= set(names["site"])


def test_what_the_net_itself_quantizes_is_a_part():
    (whole,) = [part for part in take_apart(net_of("ptq4"), tiny.SIZE, "module").parts if part.name == "(net)"]
    assert {site.name for site in whole.sites} == {name for name in names_of(net_of("ptq4")) if "." not in name}


def test_a_net_without_blocks_is_taken_apart_at_its_numbers():
    names = [part.name for part in take_apart(resnet(), tiny.SIZE, "block").parts]
    assert names == ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "fc"]


@pytest.mark.parametrize("kind", ["ofq2", "lsq4", "corrected"])
def test_a_part_alone_and_a_net_without_it(kind):
    net = net_of(kind)
    before, every = state(net), names_of(net)
    apart = take_apart(net, tiny.SIZE, "module")
    changed = 0
    for part in apart.parts:
        own = {site.name for site in part.sites}
        with apart.only(part):
            alone = tiny.logits(net)
        with apart.without(part):
            rest = tiny.logits(net)
        assert torch.equal(alone, tiny.logits(without_quantizers(net, every - own))), part.name
        assert torch.equal(rest, tiny.logits(without_quantizers(net, own))), part.name
        changed += not torch.equal(rest, tiny.logits(net))
    assert changed > len(apart.parts) / 2
    assert is_as_before(net, before)


def test_integer_norms_are_norms_where_all_else_is_float():
    net = ptq(bits=4, layernorm="integer", residual_observer="ptf")
    apart = take_apart(net, tiny.SIZE, "module")
    part = next(part for part in apart.parts if part.name == "blocks.1.mlp.fc1")
    by_hand = without_quantizers(net, names_of(net) - {site.name for site in part.sites})
    for name, module in list(by_hand.named_modules()):
        if isinstance(module, IntegerLayerNorm):
            norm = nn.LayerNorm(module.normalized_shape, eps=module.eps)
            norm.weight, norm.bias = module.weight, module.bias
            by_hand.set_submodule(name, norm)
    with apart.only(part):
        assert torch.equal(tiny.logits(net), tiny.logits(by_hand))


@pytest.mark.parametrize("side", ["blocks.1.mlp.fc1.input_quantizer", "blocks.0.residual1_quantizer", "blocks.0.mlp.fc1.weight_quantizer"])
def test_an_integer_norm_is_a_norm_where_a_quantizer_beside_it_is_in_float(side):
    net = ptq(bits=4, layernorm="integer", residual_observer="ptf")
    apart = take_apart(net, tiny.SIZE, "site")
    (quantizer,) = [site.quantizer for site in qat.iter_quantizers(net) if site.name == side]
    with apart.without(next(part for part in apart.parts if part.name == side)):
        found = {name for name, m in net.named_modules() if isinstance(m, IntegerLayerNorm) and m.__dict__.get("forward") == m.in_float}
    assert found == {name for name, m in net.named_modules() if isinstance(m, IntegerLayerNorm) and quantizer in m.between}
    assert len(found) == ("weight" not in side)
    with in_float(net):
        expected = tiny.logits(net)
    with apart.without(Part("all", tuple(site for part in apart.parts for site in part.sites), ())):
        assert torch.equal(tiny.logits(net), expected)


def converted_anew(kind, overrides):
    """The net of this kind with rules, its tensors those of the net without them."""
    if kind in PTQ:
        net = qat.convert(tiny.vit(), PtqRecipe(**PTQ[kind], overrides=overrides), input_size=tiny.SIZE)
        calibrate(net, [tiny.images(seed=1)])
        return net.eval()
    preset, knobs = QAT[kind]
    net = qat.convert(tiny.vit(), qat.recipe(preset, **knobs, overrides=overrides), input_size=tiny.SIZE)
    net.load_state_dict(net_of(kind).state_dict())
    return net.eval()


@pytest.mark.parametrize(("kind", "bits"), [("ofq2", 3), ("noqkr", 8), ("minmax", 2), ("ptq3", 2), ("corrected", 8), ("inputs", 3)])
def test_other_bits_are_those_of_a_net_converted_with_them(kind, bits):
    net = net_of(kind)
    apart = take_apart(net, tiny.SIZE, "module")
    names = [part.name for part in apart.parts if part.weights and part.name.startswith("blocks")]
    acts = conversion_of(net).recipe.act_bits
    for name in (names[0], names[-1]):
        with apart.with_bits({name: bits}, "own"):
            found = tiny.logits(net)
        assert torch.equal(found, tiny.logits(converted_anew(kind, {name: {"bits": bits, "act_bits": acts}}))), name


def test_bits_of_several_parts_at_once():
    net = net_of("ptq4")
    apart = take_apart(net, tiny.SIZE, "block")
    with apart.with_bits({"blocks.0": 2, "blocks.1": 4, "head": 8}, "own"):
        found = tiny.logits(net)
    assert torch.equal(found, tiny.logits(converted_anew("ptq4", {"blocks.0.*": {"bits": 2}, "head": {"bits": 8}})))


def test_the_net_is_as_before_after_an_error_in_the_middle():
    net = net_of("ofq2")
    before = state(net)
    apart = take_apart(net, tiny.SIZE, "module")
    part = apart.parts[3]
    for change in (apart.only(part), apart.without(part), apart.with_bits({part.name: 3}, "own")):
        with pytest.raises(RuntimeError, match="stop"), change:
            raise RuntimeError("stop")
        assert is_as_before(net, before)


def test_in_training_a_rule_about_the_head_is_about_its_input_too():
    fixed = {part.name: part.fixed for part in take_apart(net_of("ofq2"), tiny.SIZE, "module").parts if part.weights and part.fixed}
    assert fixed == {
        "patch_embed.proj": "a rule about the bits of the stem is about its input too",
        "head": "a rule about the bits of the head is about its input too",
    }
    assert not [part for part in take_apart(net_of("statsq"), tiny.SIZE, "module").parts if part.weights and part.fixed]
    assert not [part for part in take_apart(net_of("ptq4"), tiny.SIZE, "module").parts if part.weights and part.fixed]


def test_weights_of_a_float_net_have_the_steps_of_least_error():
    net = tiny.vit()
    apart = take_apart(net, tiny.SIZE, "module")
    assert apart.recipe is None
    assert all(not part.sites for part in apart.parts)
    by_hand = copy.deepcopy(net)
    weight = by_hand.blocks[0].mlp.fc1.weight
    scale, zero = qat.functional.affine_scale(weight, 3, signed=True, axis=0, method="mse")
    weight.data = qat.functional.fake_quantize_affine(weight.data, scale, zero, -4, 3, 0)
    with apart.with_bits({"blocks.0.mlp.fc1": 3}, "mse"):
        assert torch.equal(tiny.logits(apart.net), tiny.logits(by_hand))
    assert torch.equal(tiny.logits(apart.net), tiny.logits(net))
