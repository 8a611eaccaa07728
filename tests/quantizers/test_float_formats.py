"""Floats in blocks, and floats of 8 bits with one scale: what both share. Oracles: closed forms, and the names in messages."""

import pytest
import torch

import qat
from qat.callbacks.cga import CGA
from qat.callbacks.freezing import IterativeFreezing
from qat.callbacks.oscillation import Oscillation
from qat.functional.block_floats import BLOCK_FORMATS
from qat.losses import Dampening, Kure
from qat.quantizers import FloatGrid, Fp8Grid
from tests import tiny
from tests.callbacks.fitting import fit, module
from tests.errors import usage_error
from tests.losses.common import step
from tests.quantizers.common import calibrated
from tests.tiny import randn

BLOCKS = {
    "nvfp4": ("nvfp4", {}),
    "mxfp4": ("mxfp4", {}),
    "mxfp4_a8": ("mxfp4", {"act_bits": 8}),
    "qkr": ("nvfp4", {"attention": "qkr"}),
}
FP8 = {
    "fp8": ("fp8", {}),
    "fp8 standard": ("fp8", {"attention": "standard"}),
    "fp8 qkr": ("fp8", {"attention": "qkr"}),
    "held": ("fp8", {"act_quantizer": "fp8_held"}),
}
RECIPES = BLOCKS | FP8
GRIDS = [
    *((name, bits, "input", -1, FloatGrid, {4: 7, 8: 126}[bits]) for name, bits in BLOCK_FORMATS),
    ("fp8", 8, "weight", 0, Fp8Grid, 126),
    ("fp8", 8, "input", None, Fp8Grid, 126),
]
# A recipe of post-training quantization for each format.
PTQ = {
    "nvfp4": {"bits": 4, "act_bits": 4, "stem_bits": 8, "head_bits": 8, "outer_act_bits": 8},
    "fp8": {"attention": "float"},
}


def ptq(name, **changes):
    formats = {"weight_quantizer": name, "act_quantizer": name, "placement": "inputs"}
    return qat.PtqRecipe(**{**formats, **PTQ[name], **changes})


def quantized(name):
    """A tiny ViT by a recipe of `RECIPES`."""
    preset, knobs = RECIPES[name]
    return tiny.quantized(preset, **knobs)


@pytest.mark.parametrize(("name", "bits", "role", "axis", "cls", "largest"), GRIDS)
def test_the_grid(name, bits, role, axis, cls, largest):
    x = randn(4, 40)
    quantizer = calibrated(name, x, role, bits, axis=axis)
    grid, codes, y = quantizer.grid(x), quantizer.codes(x), quantizer(x)
    assert isinstance(grid, cls)
    assert grid.qmax == -grid.qmin == largest
    assert torch.equal(grid.dequantize(codes), y)
    order = grid.to_sorted_index(codes)
    assert torch.equal(order, grid.codes(x))
    torch.testing.assert_close(grid.to_code_coordinates(y), order)
    low, high = grid.ends()
    assert low <= y.min() < y.max() <= high


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_step(name):
    net = quantized(name).train()
    net(tiny.images()).logsumexp(1).sum().backward()
    gradients = {
        key: p.grad for key, p in net.named_parameters() if p.requires_grad and "qk_bias" not in key
    }
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert any("quantizer" in key for key in gradients) == (name != "held")
    gradient = gradients["blocks.0.mlp.fc1.weight"]
    assert gradient.count_nonzero() > 0.9 * gradient.numel()


@pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4), ("fp8", 8)])
def test_regularizers(name, bits):
    net = quantized(name)
    Kure()(step(net)).backward()
    inside = [s for n, s in tiny.sites(net).items() if s.is_weight and n.startswith("blocks")]
    assert all(site.owner.weight.grad.any() for site in inside)
    with usage_error(f"Dampening.max_bits={bits}: "):
        Dampening(max_bits=bits)(step(net))


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4), ("fp8", 8)])
@pytest.mark.parametrize("callback", [IterativeFreezing, CGA, Oscillation])
def test_callbacks_that_need_steps(name, bits, callback):
    settings = {"max_bits": bits} if callback is Oscillation else {}
    setting = {IterativeFreezing: "freeze", CGA: "cga"}.get(
        callback, f"oscillation.max_bits={bits}"
    )
    with usage_error(f"^callbacks.{setting}: this model has no "):
        fit(module(quantized(name)), callback(**settings))


@pytest.mark.parametrize(
    ("preset", "setting", "value", "needed"),
    [
        ("nvfp4", "bits", 8, "4"),
        ("nvfp4", "act_bits", 8, "4"),
        ("mxfp4", "bits", 3, "4 or 8"),
        ("fp8", "bits", 4, "8 with fp8"),
        ("fp8", "act_bits", 4, "8 with fp8"),
        ("fp8", "head_bits", 4, "8 with fp8"),
        ("fp8", "weight_quantizer", "fp8_held", "one"),
    ],
)
def test_recipes_that_cannot_be(preset, setting, value, needed):
    with usage_error(f"^quant.{setting}={value!r}: must be {needed}"):
        qat.recipe(preset, **{setting: value})


@pytest.mark.parametrize(
    ("preset", "switch"), [("mxfp4", "offsets"), ("fp8", "offsets"), ("minmax", "fits_int8")]
)
def test_what_a_format_cannot_have(preset, switch):
    with usage_error(f"^quant.{switch}=true: must be false with"):
        qat.recipe(preset, **{switch: True})


def test_a_rule_for_a_block_needs_a_format_too():
    rules = {"blocks.0.*": {"bits": 2}}
    with usage_error(r"^quant.overrides\['blocks.0.\*'\]: quant.bits=2: must be 4 or 8"):
        qat.recipe("mxfp4", overrides=rules)


@pytest.mark.parametrize(
    ("name", "setting", "value", "needed"),
    [
        *((name, "bias_correction", True, False) for name in PTQ),
        *((name, "method", "reconstruct", "calibrate") for name in PTQ),
        *((name, "placement", "fqvit", "inputs") for name in PTQ),
        ("nvfp4", "method", "compensate", "calibrate"),
        ("nvfp4", "bits", 8, 4),
        ("fp8", "act_observer", "mse", "minmax"),
        ("fp8", "act_scales", "token", "tensor"),
        ("fp8", "weight_scales", "tensor", "channel"),
        ("fp8", "bits", 4, 8),
        ("fp8", "head_bits", 4, 8),
    ],
)
def test_post_training_that_cannot_be(name, setting, value, needed):
    with usage_error(f"^ptq.{setting}={value!r}: must be {needed} with {name}"):
        ptq(name, **{setting: value})
