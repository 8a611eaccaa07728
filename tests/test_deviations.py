"""Where we deliberately differ from the papers' code, one test each. Oracle: what the reference does, as read in its code and run."""

import math

import pytest
import timm.layers
import torch
from torch import nn
from torch.testing import assert_close

import qat
from qat import functional as F
from qat.nn import QkrAttention
from tests.tiny import SIZE, converted, images, logits, quantized, sites, vit


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
