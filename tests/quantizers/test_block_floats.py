"""Quantizers of floats in blocks. Oracle: `qat.functional.block_float` on what a product sums over."""

import pytest
import torch

import qat
from qat import kernels
from qat.callbacks.cga import CGA
from qat.callbacks.freezing import IterativeFreezing
from qat.callbacks.oscillation import Oscillation
from qat.functional.block_floats import BLOCK_FORMATS, block_float, block_float_codes
from qat.lit import compiled
from qat.losses import Dampening, Kure
from qat.ptq.scale_vectors import scale_vectors
from qat.quantizers import FloatGrid, build_quantizer
from qat.spec import QuantSpec
from tests import tiny
from tests.callbacks.fitting import fit, module
from tests.losses.common import step
from tests.quantizers.common import build
from tests.tiny import randn

FORMATS = pytest.mark.parametrize(("name", "bits"), list(BLOCK_FORMATS))
RECIPES = {
    "nvfp4": ("nvfp4", {}),
    "mxfp4": ("mxfp4", {}),
    "mxfp4_a8": ("mxfp4", {"act_bits": 8}),
    "qkr": ("nvfp4", {"attention": "qkr"}),
}


def specs(net, *prefixes):
    """Settings of quantizers by name."""
    sites = tiny.sites(net).items()
    return {name: site.quantizer.spec for name, site in sites if name.startswith(prefixes)}


def kinds(some):
    return {(spec.quantizer, spec.bits) for spec in some}


@FORMATS
@pytest.mark.parametrize(
    ("axis", "shape"),
    [(-1, (2, 5, 40)), (-2, (2, 40, 5)), (1, (8, 40, 3, 3)), (None, (2, 40, 6, 6))],
)
def test_blocks_lie_along_an_axis(name, bits, axis, shape):
    quantizer, x, form = build(name, bits=bits, axis=axis), randn(*shape), BLOCK_FORMATS[name, bits]
    dim = 1 if axis is None else axis
    assert torch.equal(quantizer(x), block_float(x.movedim(dim, -1), form).movedim(-1, dim))
    codes, factors, t = block_float_codes(x.movedim(dim, -1), form)
    assert torch.equal(quantizer.codes(x), codes.movedim(-1, dim))
    assert quantizer.scale_bytes(x.shape) == factors.numel() + (0 if t is None else 4)
    assert not list(quantizer.parameters()) + list(quantizer.buffers())


@FORMATS
def test_the_grid(name, bits):
    quantizer, x = build(name, bits=bits, axis=-1), randn(4, 40)
    grid, codes = quantizer.grid(x), quantizer.codes(x)
    assert isinstance(grid, FloatGrid)
    assert grid.qmax == -grid.qmin == {4: 7, 8: 126}[bits]
    assert torch.equal(grid.dequantize(codes), quantizer(x))
    place = grid.in_order(codes)
    assert torch.equal(place, grid.to_code_coordinates(x).round().clamp(grid.qmin, grid.qmax))
    torch.testing.assert_close(grid.to_code_coordinates(quantizer(x)), place)
    low, high = grid.ends()
    assert low <= quantizer(x).min() < quantizer(x).max() <= high
    units = quantizer(x) / grid.unit.repeat_interleave(grid.form.block, -1)[:, :40]
    torch.testing.assert_close(units, units.round())
    assert 0.5 < grid.near_threshold(x, 0.4).float().mean() < 1
    assert not grid.near_threshold(quantizer(x), 0.4).any()
    with pytest.raises(ValueError, match="^FloatGrid: "):
        _ = quantizer.grid().scales


@FORMATS
def test_the_default_dtype_and_device_do_not_matter(name, bits):
    quantizer = build(name, bits=bits, axis=-1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert quantizer.grid().qmax == {4: 7, 8: 126}[bits]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_quantized(recipe):
    preset, knobs = RECIPES[recipe]
    net = tiny.quantized(preset, **knobs)
    assert kinds(specs(net, "patch", "head").values()) == {("lsq", 8)}
    name = "nvfp4" if preset == "nvfp4" else "mxfp"
    act_bits = knobs.get("act_bits", 4)
    inside = specs(net, "blocks").values()
    assert kinds(s for s in inside if s.role in {"weight", "qk"}) == {(name, 4)}
    assert kinds(s for s in inside if s.role not in {"weight", "qk"}) == {(name, act_bits)}
    roles = {"weight", "input", "v", "probs", "k", "qk" if recipe == "qkr" else "q"}
    assert {spec.role for spec in inside} == roles
    seen = tiny.watched(net)
    x, y = seen["blocks.0.attn.v_quantizer"]
    form = BLOCK_FORMATS[name, act_bits]
    assert torch.equal(y, block_float(x.mT, form).mT)
    for role in roles & {"q", "k", "probs"}:
        x, y = seen[f"blocks.0.attn.{role}_quantizer"]
        assert torch.equal(y, block_float(x, form))
    if recipe != "qkr":  # a head's 16 are one block, not half of one
        assert seen["blocks.0.attn.q_quantizer"][0].shape == (8, 2, 17, 16)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_step(recipe):
    preset, knobs = RECIPES[recipe]
    net = tiny.quantized(preset, **knobs).train()
    net(tiny.images()).logsumexp(1).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if "qk_bias" not in name}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    gradient = gradients["blocks.0.mlp.fc1.weight"]
    assert gradient.count_nonzero() > 0.9 * gradient.numel()


@pytest.mark.long
@pytest.mark.parametrize("length", [64, 77])
def test_a_compiled_pass_gives_the_bits_of_the_formula(length):
    def each(x, quantize):
        return [quantize(x * (2 * i + 1.1), form) for i, form in enumerate(BLOCK_FORMATS.values())]

    def run(function, quantize):
        leaf = x.clone().requires_grad_()
        made = function(leaf, quantize)
        sum((y * g).sum() for y, g in zip(made, grads, strict=True)).backward()
        return *(y.detach() for y in made), leaf.grad

    x, grads = randn(5, length), [randn(5, length, seed=i) for i in range(3)]
    x[0, 3], x[-1] = 0.0, 0.0
    compiled.register_formulas()
    torch._dynamo.reset()
    *found, of_x = run(
        torch.compile(each, fullgraph=True, options=compiled.compile_options()),
        kernels.block_floats,
    )
    torch._dynamo.reset()
    *expected, expected_of_x = run(each, block_float)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(of_x, expected_of_x)  # a sum of three


def test_regularizers():
    net = tiny.quantized("nvfp4")
    Kure()(step(net)).backward()
    inside = [s for n, s in tiny.sites(net).items() if s.is_weight and n.startswith("blocks")]
    assert all(site.owner.weight.grad.any() for site in inside)
    with pytest.raises(qat.UsageError, match="Dampening: max_bits=4: "):
        Dampening()(step(net))


@pytest.mark.parametrize(
    ("callback", "setting"),
    [(IterativeFreezing, "freeze"), (CGA, "cga"), (Oscillation, "oscillation.max_bits=4")],
)
def test_callbacks_that_need_steps(callback, setting):
    with pytest.raises(qat.UsageError, match=f"^callbacks.{setting}: this model has no "):
        fit(module(tiny.quantized("mxfp4")), callback())


@pytest.mark.parametrize(
    ("preset", "knobs", "setting"),
    [
        ("nvfp4", {"bits": 8}, "quant.bits=8: must be 4"),
        ("nvfp4", {"act_bits": 8}, "quant.act_bits=8: must be 4"),
        ("mxfp4", {"bits": 3}, "quant.bits=3: must be 4 or 8"),
        (
            "mxfp4",
            {"overrides": {"blocks.0.*": {"bits": 2}}},
            r"quant.overrides\['blocks.0.\*'\]: quant.bits=2: must be 4 or 8",
        ),
        ("mxfp4", {"offsets": True}, "quant.offsets=true: must be false"),
    ],
)
def test_recipes_that_cannot_be(preset, knobs, setting):
    with pytest.raises(qat.UsageError, match=f"^{setting} with"):
        qat.recipe(preset, **knobs)


def test_bits_that_have_no_format():
    with pytest.raises(qat.UsageError, match="bits=2: must be 4 or 8 with mxfp"):
        build_quantizer(QuantSpec("input", "mxfp", 2))


PTQ = {
    "weight_quantizer": "nvfp4",
    "act_quantizer": "nvfp4",
    "placement": "inputs",
    "bits": 4,
    "act_bits": 4,
}
OUTSIDE = {"stem_bits": 8, "head_bits": 8, "outer_act_bits": 8}


def test_post_training():
    net = qat.convert(tiny.vit(), qat.PtqRecipe(**PTQ, **OUTSIDE), input_size=tiny.SIZE)
    qat.ptq.calibrate(net, [tiny.images()])
    assert kinds(specs(net, "patch", "head").values()) == {("affine", 8)}
    trained, ours = (
        {
            name: (spec.quantizer, spec.bits, spec.axis)
            for name, spec in specs(one, "blocks").items()
        }
        for one in (tiny.converted("nvfp4"), net)
    )
    assert ours == trained
    assert torch.equal(tiny.logits(qat.freeze(net)), tiny.logits(net))
    with pytest.raises(qat.UsageError, match=r"^search.targets=\['attn.qkv.weight'\]: "):
        scale_vectors(net, ["attn.qkv.weight"])


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("bias_correction", True, False),
        ("method", "compensate", "calibrate"),
        ("method", "reconstruct", "calibrate"),
        ("placement", "fqvit", "inputs"),
        ("bits", 8, 4),
    ],
)
def test_post_training_that_cannot_be(setting, value, wanted):
    with pytest.raises(qat.UsageError, match=f"^ptq.{setting}={value!r}: must be {wanted} "):
        qat.PtqRecipe(**{**PTQ, **OUTSIDE, setting: value})
