"""Bits of each layer as rules of a recipe. Oracle: what every quantizer of a net converted by them is."""

import pytest

import qat
from qat.analysis.sensitivity.mix import with_bits
from qat.model.ptq_spec import PtqRecipe
from tests import tiny

LAYERS = (
    "patch_embed.proj",
    *(f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "head",
)
MIXED = (8, 2, 3, 4, 6, 2, 3, 4, 8, 5)


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
