"""Quantizers of floats in blocks. Oracle: `qat.functional.block_float` on what a product sums over."""

import pytest
import torch

import qat
from qat import kernels
from qat.functional.block_floats import BLOCK_FORMATS, block_float, block_float_codes
from qat.lit import compiled
from qat.ptq.scale_vectors import scale_vectors
from qat.quantizers import build_quantizer
from qat.spec import QuantSpec
from tests import tiny
from tests.errors import usage_error
from tests.quantizers.common import build
from tests.quantizers.test_float_formats import BLOCKS, ptq
from tests.tiny import identical, randn

FORMATS = pytest.mark.parametrize(("name", "bits"), list(BLOCK_FORMATS))


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
def test_units_and_thresholds_of_the_grid(name, bits):
    quantizer, x = build(name, bits=bits, axis=-1), randn(4, 40)
    grid = quantizer.grid(x)
    units = quantizer(x) / grid.unit.repeat_interleave(grid.form.block_size, -1)[:, :40]
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


@pytest.mark.parametrize("recipe", BLOCKS)
def test_what_is_quantized(recipe):
    preset, knobs = BLOCKS[recipe]
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
    compiled.register_decompositions()
    torch._dynamo.reset()
    *found, of_x = run(
        torch.compile(each, fullgraph=True, options=compiled.compile_options()),
        kernels.block_floats,
    )
    torch._dynamo.reset()
    *expected, expected_of_x = run(each, block_float)
    assert identical(found, expected)
    torch.testing.assert_close(of_x, expected_of_x)  # a sum of three


def test_bits_that_have_no_format():
    with usage_error("bits=2: must be 4 or 8 with mxfp"):
        build_quantizer(QuantSpec("input", "mxfp", 2))


def test_post_training():
    net = tiny.fitted(tiny.vit(), tiny.images(), ptq("nvfp4"))
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
    with usage_error(r"^search.targets=\['attn.qkv.weight'\]: "):
        scale_vectors(net, ["attn.qkv.weight"])
