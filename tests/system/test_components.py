"""Each part of a recipe is switched off on the command line. Oracle: the remaining quantizers, and the parameters that a step changes."""

import pytest

import qat
from qat.tasks import build
from tests.conftest import compose
from tests.nets import ATTENTIONS
from tests.tiny import convert, images, moved_by_a_step, sites, vit, with_scales

ACTIVATIONS = ("input", "k", "v", "probs")
# What quantizes roles of the net inside the blocks, by what is typed; roles that are left out are the same as without it.
SWITCHES = {
    "": {},
    "quant.act_quantizer=float": dict.fromkeys(ACTIVATIONS, "float"),
    "quant.weight_quantizer=float": {"weight": "float", "qk": "float"},
    "quant.attention=standard": {"q": "lsq", "qk": None},
    "quant.attention=float": {"qk": None, "k": None, "v": None, "probs": None},
    "quant.offsets=false": {},
    "quant.qk_bias=fold": {},
    "quant.weight_quantizer=lsq": {"weight": "lsq", "qk": "lsq"},
    "quant.weight_quantizer=minmax": {"weight": "minmax_dynamic", "qk": "minmax_dynamic"},
    "quant.act_quantizer=minmax": dict.fromkeys(ACTIVATIONS, "minmax"),
    "quant.act_quantizer=statsq": dict.fromkeys(ACTIVATIONS, "statsq"),
    "quant.stem_bits=4 quant.head_bits=4": {},
}
OFQ = {"weight": "statsq", "input": "lsq", "qk": "statsq", "k": "lsq", "v": "lsq", "probs": "lsq"}


def net(*overrides):
    """A tiny ViT converted by the recipe of a command line."""
    cfg = compose("train", "quant=ofq_2bit", *overrides, "run_dir=a")
    return with_scales(convert(vit(), build.build_recipe(cfg)))


@pytest.mark.parametrize("switch", SWITCHES)
def test_one_switch_changes_one_thing(switch):
    model = net(*switch.split())
    inside = {
        site.role: site.quantizer.spec.quantizer
        for name, site in sites(model).items()
        if name.startswith("blocks.")
    }
    expected = OFQ | SWITCHES[switch]
    assert inside == {role: name for role, name in expected.items() if name is not None}
    for site in qat.iter_quantizers(model):
        assert site.quantizer.spec.quantizer != "float" or site.quantizer.spec.bits == 32
    assert moved_by_a_step(model, images()) == {n for n, _ in model.named_parameters()}


FAMILIES = {
    "swin": ("layers.0.blocks.0", "layers.0.blocks.1", "qkr"),
    "beit": ("blocks.0", "blocks.1", "qkr"),
    "dinov3": ("blocks.0", "blocks.1", "standard"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_precision_by_name(name):
    first, second, attention = FAMILIES[name]
    rules = f"{{{first}.*:{{bits:4,act_bits:5}},*.mlp.fc2:{{bits:3}},{second}.attn:{{attention:float}},*.proj:{{weight_quantizer:lsq}}}}"
    recipe = build.build_recipe(
        compose("train", f"quant.attention={attention}", f"quant.overrides={rules}", "run_dir=a")
    )
    family = ATTENTIONS[name]
    model = family.quantized(recipe)
    found = {
        n: (s.quantizer.spec.quantizer, s.quantizer.spec.bits) for n, s in sites(model).items()
    }
    of_qk = "qk_quantizer" if attention == "qkr" else "qkv.weight_quantizer"
    assert found[f"{first}.attn.{of_qk}"] == ("statsq", 4)
    assert found[f"{first}.attn.v_quantizer"] == ("lsq", 5)
    assert found[f"{first}.attn.proj.weight_quantizer"] == ("lsq", 4)
    assert found[f"{first}.mlp.fc2.weight_quantizer"] == ("statsq", 3)
    assert found[f"{second}.mlp.fc2.weight_quantizer"] == ("statsq", 3)
    assert found[f"{second}.mlp.fc1.weight_quantizer"] == ("statsq", 2)
    assert found.get(f"{second}.attn.v_quantizer", ("float", 32)) == ("float", 32)
    assert moved_by_a_step(model, family.images(4))
