"""Each part of a recipe is switched alone from the command line. Oracle: which quantizers are left, and what a step of training moves."""

import itertools

import pytest
import timm
import torch

import qat
from qat.tasks import build
from tests.conftest import compose
from tests.nets import ATTENTIONS
from tests.tiny import KWARGS, SIZE, VIT, images, shake, sites

# Overrides, and per role of the net what quantizes it inside the blocks; roles that are left out are the same as without the switch.
SWITCHES = {
    "nothing": ((), {}),
    "weights alone": (
        ["quant.act_quantizer=float"],
        {"input": "float", "k": "float", "v": "float", "probs": "float"},
    ),
    "activations alone": (["quant.weight_quantizer=float"], {"weight": "float", "qk": "float"}),
    "no reparameterization": (["quant.attention=standard"], {"q": "lsq", "qk": None}),
    "attention in float": (
        ["quant.attention=float"],
        {"qk": None, "k": None, "v": None, "probs": None},
    ),
    "no offsets": (["quant.offsets=false"], {}),
    "query bias kept": (["quant.qk_bias=fold"], {}),
    "learned steps for weights": (["quant.weight_quantizer=lsq"], {"weight": "lsq", "qk": "lsq"}),
    "min-max weights": (
        ["quant.weight_quantizer=minmax"],
        {"weight": "minmax_dynamic", "qk": "minmax_dynamic"},
    ),
    "min-max activations": (
        ["quant.act_quantizer=minmax"],
        {"input": "minmax", "k": "minmax", "v": "minmax", "probs": "minmax"},
    ),
    "statistics for activations": (
        ["quant.act_quantizer=statsq"],
        {"input": "statsq", "k": "statsq", "v": "statsq", "probs": "statsq"},
    ),
    "float stem and head": (["quant.stem_bits=4", "quant.head_bits=4"], {}),
}
OFQ = {"weight": "statsq", "input": "lsq", "qk": "statsq", "k": "lsq", "v": "lsq", "probs": "lsq"}


def net(*overrides, quant="ofq_2bit"):
    """A tiny ViT converted by the recipe that a command line gives."""
    recipe = build.build_recipe(compose("train", f"quant={quant}", *overrides, "run_dir=a"))
    torch.manual_seed(0)
    plain = shake(timm.create_model(VIT, **KWARGS))
    return qat.initialize_scales(qat.convert(plain, recipe, input_size=SIZE), [images()])


def moves(model, n_pixels=None):
    """Names of parameters that one optimizer step moves; all gradients have to be finite."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = images() if n_pixels is None else n_pixels
    model.train()(x).square().sum().backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0).step()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("switch", SWITCHES)
def test_one_switch_changes_one_thing(switch):
    overrides, changed = SWITCHES[switch]
    model = net(*overrides)
    inside = {
        s.role: s.quantizer.spec.quantizer
        for n, s in sites(model).items()
        if n.startswith("blocks.")
    }
    assert inside == {
        role: quantizer for role, quantizer in (OFQ | changed).items() if quantizer is not None
    }
    assert {
        s.quantizer.spec.bits
        for s in qat.iter_quantizers(model)
        if s.quantizer.spec.quantizer == "float"
    } <= {32}
    assert moves(model) == {n for n, _ in model.named_parameters()}


def test_the_presets_differ_by_one_part():
    # A ladder from weights alone to the whole method.
    def parts(name):
        cfg = compose("train", f"quant={name}_2bit", "run_dir=a").quant
        return {
            key: cfg[key]
            for key in ("attention", "weight_quantizer", "act_quantizer", "act_bits", "offsets")
        }

    ladder = [parts(name) for name in ("statsq", "ofq_noqkr", "ofq")]
    differ = [{key for key in a if a[key] != b[key]} for a, b in itertools.pairwise(ladder)]
    assert differ == [{"act_quantizer"}, {"attention"}]


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
    model = qat.initialize_scales(
        qat.convert(family.build(), recipe, input_size=family.input_size), [family.images(4)]
    )
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
    assert moves(model, family.images(4))
