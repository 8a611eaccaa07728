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
from qat.losses import Dampening, Kure, StepContext
from qat.ptq.scale_vectors import scale_vectors
from qat.quantizers import FloatGrid, build_quantizer
from qat.spec import QuantSpec
from tests import tiny
from tests.callbacks.fitting import fit, module
from tests.quantizers.common import build
from tests.tiny import randn

FORMATS = pytest.mark.parametrize(("name", "bits"), list(BLOCK_FORMATS))
RECIPES = {
    "nvfp4": ("nvfp4", {}),
    "mxfp4": ("mxfp4", {}),
    "mxfp4_a8": ("mxfp4", {"act_bits": 8}),
    "qkr": ("nvfp4", {"attention": "qkr"}),
}


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
    lowest = quantizer(x).abs().unflatten(-1, (-1, 8)) / grid.unit.repeat_interleave(
        grid.form.block // 8, -1
    )[:, :5].unsqueeze(-1)
    torch.testing.assert_close(lowest, lowest.round())
    assert 0.5 < grid.near_threshold(x, 0.4).float().mean() < 1
    assert not grid.near_threshold(quantizer(x), 0.4).any()
    with pytest.raises(ValueError, match="FloatGrid: its scales are those of a tensor"):
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
    found = {
        (s.quantizer.spec.quantizer, s.quantizer.spec.bits)
        for n, s in tiny.sites(net).items()
        if n.startswith(("patch", "head"))
    }
    assert found == {("lsq", 8)}
    name = "nvfp4" if preset == "nvfp4" else "mxfp"
    inside = [s for n, s in tiny.sites(net).items() if n.startswith("blocks")]
    expected = {True: (name, 4), False: (name, knobs.get("act_bits", 4))}
    assert all(
        (s.quantizer.spec.quantizer, s.quantizer.spec.bits) == expected[s.is_weight] for s in inside
    )
    roles = {"weight", "input", "v", "probs"} | ({"qk", "k"} if recipe == "qkr" else {"q", "k"})
    assert {s.role for s in inside} == roles
    seen = tiny.watched(net)
    x, y = seen["blocks.0.attn.v_quantizer"]
    form = BLOCK_FORMATS[name, knobs.get("act_bits", 4)]
    assert torch.equal(y, block_float(x.mT, form).mT)
    for role in roles & {"q", "k", "probs"}:
        x, y = seen[f"blocks.0.attn.{role}_quantizer"]
        assert torch.equal(y, block_float(x, form))
    if recipe != "qkr":
        assert seen["blocks.0.attn.q_quantizer"][0].shape == (
            8,
            2,
            17,
            16,
        )  # a head's 16 are one block, not half of one


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_step(recipe):
    preset, knobs = RECIPES[recipe]
    net = tiny.quantized(preset, **knobs).train()
    net(tiny.images()).logsumexp(1).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if "qk_bias" not in name}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert (
        gradients["blocks.0.mlp.fc1.weight"].count_nonzero()
        > 0.9 * gradients["blocks.0.mlp.fc1.weight"].numel()
    )


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_kernels_can_be_chosen(choice):
    quantizer, x = build("nvfp4", axis=-1), randn(3, 40)
    try:
        kernels.use(choice)
        assert torch.equal(quantizer(x), block_float(x, BLOCK_FORMATS["nvfp4", 4]))
    finally:
        kernels.use("auto")


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
    step = StepContext(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), None, net)
    Kure()(step).backward()
    assert all(
        s.owner.weight.grad.any()
        for n, s in tiny.sites(net).items()
        if s.is_weight and n.startswith("blocks")
    )
    with pytest.raises(
        qat.UsageError,
        match="Dampening: max_bits=4: this model has no weights of so few bits on a uniform grid",
    ):
        Dampening()(step)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            IterativeFreezing,
            "callbacks.freeze: this model has no weights of up to 4 bits on a uniform grid",
        ),
        (CGA, "callbacks.cga: this model has no weights on a half-step grid"),
        (
            Oscillation,
            "callbacks.oscillation.max_bits=4: this model has no quantized weights of at most 4 bits, floats in blocks aside",
        ),
    ],
)
def test_callbacks_that_need_steps(callback, message):
    with pytest.raises(qat.UsageError, match=message):
        fit(module(tiny.quantized("mxfp4")), callback())


@pytest.mark.parametrize(
    ("preset", "knobs", "message"),
    [
        ("nvfp4", {"bits": 8}, "quant.bits=8: must be 4 with nvfp4"),
        ("nvfp4", {"act_bits": 8}, "quant.act_bits=8: must be 4 with nvfp4"),
        ("mxfp4", {"bits": 3}, "quant.bits=3: must be 4 or 8 with mxfp"),
        (
            "mxfp4",
            {"overrides": {"blocks.0.*": {"bits": 2}}},
            r"quant.overrides\['blocks.0.\*'\]: quant.bits=2: must be 4 or 8 with mxfp",
        ),
        (
            "mxfp4",
            {"offsets": True},
            "quant.offsets=True: must be false with mxfp, whose blocks follow the heads",
        ),
    ],
)
def test_recipes_that_cannot_be(preset, knobs, message):
    with pytest.raises(qat.UsageError, match=message):
        qat.recipe(preset, **knobs)
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
    found = {
        (s.quantizer.spec.quantizer, s.quantizer.spec.bits)
        for n, s in tiny.sites(net).items()
        if n.startswith(("patch", "head"))
    }
    assert found == {("affine", 8)}
    trained = {
        name: s.quantizer.spec
        for name, s in tiny.sites(tiny.converted("nvfp4")).items()
        if name.startswith("blocks")
    }
    ours = {
        name: s.quantizer.spec for name, s in tiny.sites(net).items() if name.startswith("blocks")
    }
    assert {n: (s.quantizer, s.bits, s.axis) for n, s in ours.items()} == {
        n: (s.quantizer, s.bits, s.axis) for n, s in trained.items()
    }
    assert torch.equal(tiny.logits(qat.freeze(net)), tiny.logits(net))
    message = r"search.targets=\['attn.qkv.weight'\]: must match a scale of a block; stored scales are those of nothing"
    with pytest.raises(qat.UsageError, match=message):
        scale_vectors(net, ["attn.qkv.weight"])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bias_correction": True}, "ptq.bias_correction=True: must be False with nvfp4"),
        ({"method": "compensate"}, "ptq.method='compensate': must be calibrate with nvfp4"),
        ({"method": "reconstruct"}, "ptq.method='reconstruct': must be calibrate with nvfp4"),
        ({"placement": "fqvit"}, "ptq.placement='fqvit': must be inputs with nvfp4"),
        ({"bits": 8}, "ptq.bits=8: must be 4 with nvfp4"),
    ],
)
def test_post_training_that_cannot_be(knobs, message):
    with pytest.raises(qat.UsageError, match=message):
        qat.PtqRecipe(**{**PTQ, **OUTSIDE, **knobs})
