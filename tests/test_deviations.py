"""Where we deliberately differ from the papers' code, one test each. Oracle: what the reference does, as read in its code and run."""

import math

import pytest
import timm.layers
import torch
from torch import nn
from torch.testing import assert_close

import qat
from qat import functional as F
from qat.data import Digits
from qat.data.sampler import SeededSampler
from qat.lit import Teacher
from qat.nn import QkrAttention
from qat.quantizers import build_quantizer
from qat.transfer import forget_attention_weights
from tests.tiny import DISTILLED, SIZE, converted, images, logits, quantized, sites, vit


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
def test_deviates_from_reference_pretrained_attention_is_kept(preset):
    # There `proj`, and without QKR also `qkv`, start at random.
    net, plain = converted(preset), vit()
    for ours, theirs in zip(net.blocks, plain.blocks, strict=True):
        assert torch.equal(ours.attn.proj.weight, theirs.attn.proj.weight)
        assert torch.equal(ours.attn.proj.bias, theirs.attn.proj.bias)
        if preset == "ofq":
            parts = (ours.attn.q_weight, ours.attn.k_weight, ours.attn.v.weight)
            assert torch.equal(torch.cat(parts), theirs.attn.qkv.weight)
        else:
            assert torch.equal(ours.attn.qkv.weight, theirs.attn.qkv.weight)
            assert torch.equal(ours.attn.qkv.bias, theirs.attn.qkv.bias)


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_deviates_from_reference_no_bias_appears(preset):
    # There every quantized Linear gets a bias, at random where the source had none.
    net = qat.convert(vit(qkv_bias=False, proj_bias=False), qat.recipe(preset), input_size=SIZE)
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
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    key.register_forward_hook(lambda module, args, out: out + shift)
    assert_close(logits(net), expected, rtol=1e-4, atol=1e-4)


def test_deviates_from_reference_scales_exist_from_conversion_on(tmp_path):
    # There they are None until a first batch: a strict load into a fresh net fails and an early optimizer never trains them.
    net = converted("ofq", bits=2)
    early = [p for group in torch.optim.SGD(net.parameters(), lr=0.1).param_groups for p in group["params"]]
    assert logits(net).isnan().all()
    qat.initialize_scales(net, [images()])
    assert {id(p) for p in early} == {id(p) for p in net.parameters()}

    fresh = converted("ofq", bits=2)
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(logits(fresh), logits(net))
    qat.save(net, tmp_path / "net.ckpt")
    assert torch.equal(logits(qat.load(tmp_path / "net.ckpt")), logits(net))


def test_deviates_from_reference_sign_of_images_is_found_at_initialisation():
    # There any forward with a negative pixel, also in evaluation, switches the net to signed codes for good.
    net = qat.initialize_scales(converted(), [images().abs()])
    expected = logits(net, images().abs())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    logits(net, -images().abs())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(logits(net, images().abs()), expected)
    assert sites(net)["patch_embed.proj.input_quantizer"].quantizer.codes(images()).min() == 0


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


@pytest.mark.parametrize("processes", [2, 4])
def test_deviates_from_reference_scale_gradient_counts_the_global_batch(processes):
    # There the gradient of a scale grows by sqrt(processes) when a batch is split among them.
    x = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))

    def gradient(part, grad_factor):
        scale = torch.full((5,), 0.3, requires_grad=True)
        F.lsq(part, scale, -2, 1, 1, grad_factor=grad_factor).square().mean().backward()
        return scale.grad

    def averaged(grad_factor):
        return sum(gradient(part, grad_factor) for part in x.chunk(processes)) / processes

    whole = gradient(x, 1.0)
    assert_close(averaged(1.0), math.sqrt(processes) * whole)
    assert_close(averaged(1 / math.sqrt(processes)), whole)


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
    assert net.patch_embed.proj.input_quantizer.offset_before.shape == (8, 12)
    x = torch.randn(4, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    qat.initialize_scales(net, [x])
    assert logits(net, x).isfinite().all()


def test_deviates_from_reference_bfloat16_stays_on_the_grid():
    # There plain bounds in bfloat16 round 1 - 1e-6 to 1: the top code becomes n, off the grid.
    w = torch.tensor([[1.0, 0.1, -0.1, -1.0]], dtype=torch.bfloat16)
    assert F.statsq_codes(w, 2).tolist() == [[1, 0, -1, -2]]
    assert torch.equal(F.statsq(w, 2), F.statsq(w.float(), 2).bfloat16())


def test_deviates_from_reference_product_offset_is_a_bias():
    # There it is a module of its own around the quantizer; as a bias of the folded map it is the same arithmetic.
    net = quantized(bits=2)
    attention = net.blocks[0].attn
    with torch.no_grad():
        attention.product_offset.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(1))
    xq = attention.input_quantizer(x)
    product = xq @ attention.qk_quantizer(attention.latent("qk")).T + attention.product_offset
    keys = attention.k_quantizer(product.reshape(2, 17 * 2, 32)).reshape(2, 17, 2, 32)
    expected = torch.einsum("bnc,bmhc->bhnm", xq, keys)
    assert_close(attention._scores(xq), expected, rtol=1e-5, atol=1e-5)


def test_deviates_from_reference_an_axis_never_means_the_batch():
    # There a position-wise quantizer on (B, C) has one scale per image of the batch.
    net = quantized(bits=8)
    spec = qat.recipe("ofq").act_spec("input", "block")
    quantizer = build_quantizer(spec)
    quantizer.allocate(torch.Size((4, 32)), torch.device("cpu"))
    assert quantizer.n_scales == 1
    assert sites(net)["head.input_quantizer"].quantizer.n_scales == 1


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_deviates_from_reference_attention_weights_are_lost_only_on_request(preset):
    # `model.init=reference` does what the reference's conversion does: proj, and qkv without QKR, are drawn anew; nothing else is.
    net = converted(preset)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    lost = forget_attention_weights(net)
    changed = {name for name, p in net.named_parameters() if not torch.equal(p.nan_to_num(), before[name].nan_to_num())}
    linears = ("proj",) if preset == "ofq" else ("qkv", "proj")
    expected = [f"blocks.{i}.attn.{linear}" for i in (0, 1) for linear in linears]
    assert lost == expected
    assert changed == {f"{name}.{part}" for name in expected for part in ("weight", "bias")}


def test_deviates_from_reference_teacher_is_frozen():
    # There the teacher stays in train mode, with gradients, and its class head alone is the target even so.
    net = vit(DISTILLED)
    teacher = Teacher(net.train(), "cls")
    x = images()
    target = teacher(x)
    assert not target.requires_grad
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(m.training for m in net.modules())
    assert torch.equal(target, net.head(net.forward_features(x)[:, 0]))
    assert not torch.equal(target, Teacher(net, "mean")(x))


def test_deviates_from_reference_scales_come_from_images_without_augmentation():
    # There one augmented training batch makes the scales, another one for another order of the data.
    data = Digits(image_size=8, patch_size=4, in_chans=1, num_classes=10, mean=[0.0], std=[1.0], augment="light", calibration_images=64)
    first, again = data.calibration_batches()[0], data.calibration_batches()[0]
    assert torch.equal(first, again)
    known = {image.tobytes() for image in data.split("train").images}
    assert all((image * 255).round().byte().permute(1, 2, 0).numpy().tobytes() in known for image in first)


def test_deviates_from_reference_order_is_a_function_of_seed_and_epoch():
    # There it depends on the state of a global generator, and so on everything that drew from it before.
    sampler = SeededSampler(100, seed=3, shuffle=True)
    sampler.set_epoch(2)
    first = list(sampler)
    torch.rand(5)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
