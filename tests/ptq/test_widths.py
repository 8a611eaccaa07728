"""Bits of weights that change after calibration. Oracle: a net converted with those bits and calibrated then."""

import pytest

import qat
from qat.errors import UsageError
from qat.functional.allocation import assigned_bytes
from qat.model.blocks import find_blocks
from qat.model.cost import size_bytes
from qat.model.ptq_spec import PtqRecipe
from qat.ptq.block_cache import trace
from qat.ptq.widths import Widths, set_bits, with_bits
from tests import tiny
from tests.ptq.bit_nets import LAYERS, bits_of, calibrated, same, with_overrides
from tests.ptq.searching import batches, state

MIXED = (8, 2, 3, 4, 6, 2, 3, 4, 8, 5)
RULES = {name: {"bits": bits} for name, bits in zip(LAYERS, MIXED, strict=True)}


def widths(net, *targets):
    return Widths(net, targets or ("*",), trace(net, find_blocks(net), batches()[0][:1]).order)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"weight_observer": "omse", "bias_correction": True},
        {"weight_observer": "mse", "weight_signed": True},
        {"weight_observer": "percentile", "placement": "inputs"},
    ],
)
def test_scales_are_those_of_calibration_with_these_bits(knobs):
    net, _ = calibrated(**knobs)
    before, found = state(net), widths(net)
    assert (found.names, found.read()) == (LAYERS, (4,) * 10)
    changed = found.write(MIXED)
    assert {site.name.rpartition(".")[0] for site in changed} == {n for n, b in zip(LAYERS, MIXED, strict=True) if b != 4}
    expected = with_overrides(RULES, **knobs)
    assert same(state(net), expected.state_dict())
    assert tiny.logits(net).equal(tiny.logits(expected))
    found.write((4,) * 10)
    assert same(state(net), before)


def test_scales_that_a_search_has_changed_come_back():
    net, _ = calibrated()
    net.head.weight_quantizer.scale.mul_(1.25)
    before, found = state(net), widths(net)
    found.write((2,) * 10)
    found.write((4,) * 10)
    assert same(state(net), before)


def test_the_size_is_that_of_the_codes_and_a_rest():
    net, _ = calibrated()
    found = widths(net)
    rest = size_bytes(net) - assigned_bytes(found.numels, found.read())
    for bits in (MIXED, (2,) * 10, (8,) * 10):
        found.write(bits)
        assert size_bytes(net) == rest + assigned_bytes(found.numels, bits)


def test_targets():
    net, _ = calibrated()
    assert widths(net, "head", "blocks.*.attn.*").names == tuple(n for n in LAYERS if "attn" in n or n == "head")
    with pytest.raises(UsageError, match=r"search.targets=\['nope'\]: no such module has .*; those are patch_embed.proj, "):
        widths(net, "nope")
    set_bits(net, {"head": 8, "blocks.0.mlp.fc1": 2})
    assert {name for name, bits in bits_of(net).items() if bits != 4} == {"head", "blocks.0.mlp.fc1"}


def test_a_float_weight_is_none_of_them():
    net = with_overrides({"head": {"weight_quantizer": "float"}})
    assert "head" not in widths(net).names


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"head": {"bits": 8, "act_bits": 6}, "*": {"act_bits": 5}},
        {"head": {"head_bits": 3, "act_observer": "omse"}, "blocks.0.*": {"bits": 3, "bias_correction": True}},
        {"patch_embed.*": {"stem_bits": 8}, "blocks.1.mlp.fc2": {"act_bits": 4}},
    ],
)
def test_rules_give_the_bits_and_keep_everything_else(rules):
    """Oracle: what every quantizer of a converted net is, its width and its observer."""

    def specs(overrides):
        net = qat.convert(tiny.vit(), PtqRecipe(bits=4, overrides=overrides), input_size=tiny.SIZE)
        return {site.name: (site.quantizer.spec, site.quantizer.spec.observer) for site in qat.iter_quantizers(net)}

    before = specs(rules)
    after = specs(with_bits(PtqRecipe(bits=4, overrides=rules), dict(zip(LAYERS, MIXED, strict=True))))
    weights = {f"{name}.weight_quantizer": bits for name, bits in zip(LAYERS, MIXED, strict=True)}
    assert {name: after[name][0].bits for name in weights} == weights
    others = before.keys() - weights.keys()
    assert {name: before[name] for name in others} == {name: after[name] for name in others}
    assert {name: before[name][0].bias_correction for name in weights} == {name: after[name][0].bias_correction for name in weights}
