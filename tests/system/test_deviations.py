"""Deliberate differences from the papers' code, with one test each. Oracle: what the reference does, as read in its code and run."""

import dataclasses
import re

import pytest
import timm.layers
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.testing import assert_close

import qat
from qat import functional as F
from qat.lit import Teacher
from qat.losses import Distillation, StepContext
from qat.model.transfer import add_random_biases, reset_attention_weights
from qat.nn import QkrAttention
from tests.callbacks.fitting import Steps, fit, module, moved, weights
from tests.callbacks.test_cga import annealing
from tests.conftest import ROOT
from tests.nets import ATTENTIONS
from tests.tiny import (
    DISTILLED,
    convert,
    converted,
    images,
    logits,
    quantized,
    randn,
    sites,
    vit,
)


def test_every_line_of_the_page_has_its_test_and_every_test_its_line():
    lines = re.split(r"\n(?=- |\n|#)", (ROOT / "docs" / "deviations.md").read_text())
    ends = [re.search(r"\(((?:`\w+`(?:, )?)+)\)$", line) for line in lines if line.startswith("- ")]
    assert len(ends) > 50
    assert all(ends)
    named = [name for end in ends for name in re.findall(r"\w+", end[1])]
    files = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = [
        name
        for text in files
        for name in re.findall(r"^def test_deviates_from_reference_(\w+)\(", text, re.MULTILINE)
    ]
    assert sorted(named) == sorted(tests)


def test_deviates_from_reference_zero_row():
    # There 0/0 makes the whole row NaN.
    w = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]], requires_grad=True)
    for bits in (2, 3, 8):
        out = F.statsq(w, bits)
        assert out[0].tolist() == [0, 0, 0]
        assert torch.equal(out[1:], F.statsq(w[1:], bits))
    out.sum().backward()
    assert w.grad.tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_deviates_from_reference_no_bias_appears(preset):
    # There every quantized Linear gets a bias, at random where the source had none.
    net = convert(vit(qkv_bias=False, proj_bias=False), preset)
    attention = net.blocks[0].attn
    assert attention.proj.bias is None
    assert (attention.v if preset == "ofq" else attention.qkv).bias is None


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_deviates_from_reference_dead_offsets_do_not_exist(preset):
    # There an offset follows the quantizer of the product or the key: it shifts whole softmax rows, so its gradient is rounding noise.
    net = quantized(preset, bits=2)
    key = sites(net)["blocks.0.attn.k_quantizer"].quantizer
    assert [n for n, _ in key.named_parameters() if "after" in n] == []
    expected = logits(net)
    shift = randn(32)
    key.register_forward_hook(lambda module, args, out: out + shift)
    assert_close(logits(net), expected, rtol=1e-4, atol=1e-4)


def test_deviates_from_reference_query_bias_can_be_folded():
    # There it is dropped, which changes the attention at any bit width.
    torch.manual_seed(0)
    plain = timm.layers.Attention(8, num_heads=2, qkv_bias=True)
    nn.init.normal_(plain.qkv.weight)
    nn.init.normal_(plain.qkv.bias)
    x = torch.randn(2, 1, 5, 8)
    exact = plain(x.squeeze(1))
    outputs = {}
    for qk_bias in ("drop", "fold"):
        recipe = qat.recipe("ofq", qk_bias=qk_bias, weight_quantizer="float", act_quantizer="float")
        net = qat.convert(nn.Sequential(nn.Flatten(1, 2), plain), recipe, input_size=(1, 5, 8))
        assert isinstance(net[1], QkrAttention)
        outputs[qk_bias] = net(x)
    assert_close(outputs["fold"], exact, rtol=1e-4, atol=1e-5)
    assert (outputs["drop"] - exact).abs().max() > 0.1


def test_deviates_from_reference_calibrated_range_holds_zero():
    # There a range beside zero keeps its width but not its place: the zero point is clipped and with it every value.
    x = torch.linspace(5, 6, 50)
    scale, zero_point = F.affine_scale(x, 8, False, None)
    reference = F.fake_quantize_affine(x, scale, zero_point, 0, 255, None)
    assert (reference - x).abs().min() > 3
    net = nn.Sequential(nn.Linear(1, 1))
    qat.convert(net, qat.recipe("minmax", bits=8), input_size=(1, 50, 1))
    quantizer = sites(net)["0.input_quantizer"].quantizer
    quantizer.calibrate(x.view(1, 1, 50, 1), {})
    assert (quantizer(x.view(1, 1, 50, 1)).flatten() - x).abs().max() <= quantizer.scale.max()


def test_deviates_from_reference_images_need_not_be_square():
    # There the offset map is 224 x 224 whatever the image.
    net = qat.convert(vit(img_size=(8, 12)), qat.recipe("ofq", bits=2), input_size=(1, 8, 12))
    assert net.patch_embed.proj.input_quantizer.before.shape == (8, 12)
    x = randn(4, 1, 8, 12)
    qat.initialize_scales(net, [x])
    assert logits(net, x).isfinite().all()


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_deviates_from_reference_attention_weights_are_lost_only_on_request(preset):
    # `model.init=reference` does what the reference's conversion does: proj, and qkv without QKR, are drawn anew; nothing else is.
    net = converted(preset)
    before = weights(net)
    lost = reset_attention_weights(net)
    changed = {
        name
        for name, p in net.named_parameters()
        if not torch.equal(p.nan_to_num(), before[name].nan_to_num())
    }
    linears = ("proj",) if preset == "ofq" else ("qkv", "proj")
    expected = [f"blocks.{i}.attn.{linear}" for i in (0, 1) for linear in linears]
    assert lost == expected
    assert changed == {f"{name}.{part}" for name in expected for part in ("weight", "bias")}


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_deviates_from_reference_position_biases_are_kept(preset):
    # There Swin's tables start at random, whatever was pretrained.
    plain = ATTENTIONS["swin"].build()
    net = ATTENTIONS["swin"].converted(preset)
    tables = [name for name, _ in plain.named_parameters() if name.endswith("bias_table")]
    assert len(tables) == 4
    for name in tables:
        assert torch.equal(net.get_parameter(name), plain.get_parameter(name))
    assert set(tables) <= set(reset_attention_weights(net))
    for name in tables:
        assert not torch.equal(net.get_parameter(name), plain.get_parameter(name))


def test_deviates_from_reference_a_merging_gets_a_bias_only_on_request():
    # There patch merging, which has no bias, gets one with random values.
    swin = ATTENTIONS["swin"]
    name = "layers.1.downsample.reduction"
    assert swin.converted().get_submodule(name).bias is None
    net = swin.build()
    assert add_random_biases(net) == [name]
    net = qat.convert(net, qat.recipe("ofq"), input_size=swin.input_size)
    assert 0 < net.get_submodule(name).bias.abs().max() <= 64**-0.5


def test_deviates_from_reference_bits_of_a_teacher_are_its_own():
    # There `--quant-teacher` writes 4 over the bits of the student, which its masks then have.
    student = converted(bits=2)
    recipe = student.qat_conversion.recipe
    converted(bits=4)
    assert {s.quantizer.spec.bits for s in qat.iter_quantizers(student)} == {2, 8}
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.bits = 4


@pytest.mark.parametrize("attention", ["qkr", "standard", "float"])
def test_deviates_from_reference_distillation_works_with_every_attention(attention):
    # There two of three kinds of distillation crash, because quantized attentions hand out nothing to compare.
    net = quantized("ofq", DISTILLED, bits=2, attention=attention).train()
    net.set_distilled_training(enable=True)
    logits_of_heads, target = net(images(4)), torch.arange(4)
    teacher = Teacher(vit(DISTILLED), "cls")
    Distillation()(StepContext(logits_of_heads, target, teacher(images(4)), net)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_deviates_from_reference_annealing_masks_under_mixed_precision(precision):
    # There annealing is left out without a word where a gradient scaler is in use, and a gradient that is NaN survives the mask.
    class Poison(Callback):
        def on_after_backward(self, trainer, pl_module):
            weight = pl_module.net.blocks[0].mlp.fc1.weight
            weight.grad[~F.near_threshold(weight, 2, 0.05)] = torch.nan

    steps = Steps()
    fit(module(quantized(bits=2)), Poison(), annealing(), steps, max_epochs=1, precision=precision)
    name = "blocks.0.mlp.fc1.weight"
    for t in range(4):
        changed = moved(steps, t, name)
        assert changed.any()
        assert F.near_threshold(steps.before[t][name], 2, 0.05)[changed].all()
        assert steps.after[t][name].isfinite().all()


def test_deviates_from_reference_a_mask_is_on_the_grid_of_its_own_weight():
    # There one number of bits, which a quantized teacher can change, makes the masks of all weights.
    start, steps = quantized(bits=2, overrides={"blocks.1.*": {"bits": 4}}), Steps()
    fit(module(start), annealing(), steps, max_epochs=1, limit_train_batches=1)
    for block, bits, other in ((0, 2, 4), (1, 4, 2)):
        name = f"blocks.{block}.mlp.fc1.weight"
        before, changed = steps.before[0][name], moved(steps, 0, name)
        assert F.near_threshold(before, bits, 0.05)[changed].all()
        assert not F.near_threshold(before, other, 0.05)[changed].all()


@pytest.mark.parametrize(("map_scales", "scales"), [("tensor", 1), ("column", 8)])
def test_deviates_from_reference_maps_have_one_scale(map_scales, scales):
    # There a map (B, H, W, C) meets the rule for tokens, dimension -2, and every column of it gets a scale.
    net = ATTENTIONS["swin"].quantized(bits=2, map_scales=map_scales)
    mlp = net.layers[0].blocks[0].mlp
    for layer in (mlp.fc1, mlp.fc2):
        assert layer.input_quantizer.num_stored_scales == scales
    x = randn(1, 64, 16)
    # Two columns change places: the result follows only if they share a scale.
    swapped = torch.arange(64).view(8, 8)[:, [1, 0, *range(2, 8)]].flatten()
    assert torch.allclose(mlp(x[:, swapped]), mlp(x)[:, swapped]) == (map_scales == "tensor")
