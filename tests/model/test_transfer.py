"""Weights across nets. Oracle: equal logits where nothing is lost, a message or a note where something is."""

import http.client
import time
import urllib.error
import urllib.request

import huggingface_hub
import pytest
import timm
import torch
from torch.testing import assert_close

import qat
from qat.model.checkpoint import read_checkpoint
from qat.model.start import from_checkpoint, from_scratch, from_timm
from qat.model.transfer import copy_scales
from tests.callbacks.fitting import differing
from tests.errors import usage_error
from tests.tiny import (
    DISTILLED,
    KWARGS,
    VIT,
    convert,
    converted,
    fitted,
    images,
    logits,
    quantized,
    shake,
    sites,
    vit,
    with_scales,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "start.ckpt"


def start(path, model=VIT, *, reset_head=False, **changes):
    return from_checkpoint(
        model, {**KWARGS, **changes}, read_checkpoint(path), reset_head=reset_head
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", [VIT, DISTILLED])
@pytest.mark.parametrize("preset", ["fp", "ofq_noqkr", "lsq", "seq", "minmax"])
def test_a_checkpoint_of_ours_gives_back_the_float_net(path, preset, name):
    qat.save(quantized(preset, name), path)
    made = start(path, name)
    assert not differing(made.net.state_dict(), vit(name).state_dict())
    assert made.notes == [f"weights of ckpt={str(path)!r}"]
    assert list(qat.iter_quantizers(made.net)) == []


def test_four_bits_to_two(path):
    four = quantized("lsq", bits=4)
    with torch.no_grad():
        four.head.weight.mul_(2)
    qat.save(four, path)
    made = start(path)
    two = convert(made.net, "lsq", bits=2)
    assert torch.equal(two.head.weight, four.head.weight)
    assert torch.equal(two.blocks[1].mlp.fc1.weight, four.blocks[1].mlp.fc1.weight)
    copied, missing = copy_scales(made.source, two)
    eight_bit = {n for n, s in sites(two).items() if s.quantizer.spec.bits == 8}
    assert set(copied) == eight_bit
    assert set(missing) == set(sites(two)) - eight_bit
    with usage_error(missing[0]):
        qat.assert_ready(two)
    with_scales(two)
    qat.assert_ready(two)
    assert torch.equal(two.head.weight_quantizer.scale, four.head.weight_quantizer.scale)


@pytest.mark.sample(1)
@pytest.mark.parametrize("qk_bias", ["fold", "drop"])
def test_reparameterized_to_standard_and_back(path, qk_bias):
    qkr = quantized(qk_bias=qk_bias)
    qat.save(qkr, path)
    float_net = start(path).net
    if qk_bias == "fold":  # the key bias is gone, to which a softmax is blind
        assert_close(logits(float_net), logits(vit()), rtol=1e-5, atol=1e-5)
    else:
        assert float_net.blocks[0].attn.qkv.bias[:64].abs().max() == 0
    qat.save(with_scales(convert(float_net, "ofq_noqkr")), path)
    back = convert(start(path).net, qk_bias=qk_bias)
    weights = {
        name: parameter
        for name, parameter in qkr.named_parameters()
        if "_quantizer" not in name and "offset" not in name
    }
    names = {"blocks.0.attn.q_weight", "blocks.0.attn.v.weight", "blocks.1.attn.proj.bias"}
    assert names <= set(weights)
    assert all(torch.equal(back.get_parameter(name), p) for name, p in weights.items())


def test_another_class_count_needs_consent(path):
    qat.save(quantized(), path)
    with usage_error(f"^ckpt='{path}': has 10 classes, the data 7; model.reset_head=true"):
        start(path, num_classes=7)
    made = start(path, num_classes=7, reset_head=True)
    assert made.net.head.weight.shape == (7, 32)
    assert "new head for 7 classes (the file has 10)" in made.notes
    assert torch.equal(made.net.blocks[0].mlp.fc1.weight, vit().blocks[0].mlp.fc1.weight)


def test_another_patch_size_is_resampled(path):
    torch.save(vit().state_dict(), path)
    net = start(path, patch_size=4).net
    assert net.patch_embed.proj.weight.shape == (32, 1, 4, 4)
    assert net.pos_embed.shape == (1, 5, 32)
    # Patches of one grey level, twice as large: the resampled embedding answers as the old one did.
    grey = torch.ones(1, 1, 8, 8)
    new, old = (model.patch_embed(grey)[0, 0] for model in (net, vit()))
    assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_another_image_size_gets_positions_in_between(path):
    qat.save(quantized(), path)
    net = start(path, img_size=16).net
    assert net.pos_embed.shape == (1, 65, 32)
    assert torch.equal(net.pos_embed[:, 0], vit().pos_embed[:, 0])
    assert torch.equal(net.head.weight, vit().head.weight)


def test_colour_weights_are_summed_for_grey_images(path):
    colour = vit(in_chans=3)
    torch.save(colour.state_dict(), path)
    made = start(path)
    assert_close(
        made.net.patch_embed.proj.weight, colour.patch_embed.proj.weight.sum(1, keepdim=True)
    )
    grey = images()
    assert_close(
        logits(made.net, grey), logits(colour, grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (
            timm.create_model("resnet18", num_classes=10).state_dict(),
            "the file has weights such as bn1.bias; the model has 2 blocks of width 32",
        ),
        (
            vit(embed_dim=64).state_dict(),
            "the file has 2 blocks of width 64; the model has 2 blocks of width 32",
        ),
        (
            vit(depth=3).state_dict(),
            "the file has 3 blocks of width 32; the model has 2 blocks of width 32",
        ),
        (vit(DISTILLED).state_dict(), "Error"),
    ],
    ids=["resnet", "wider", "deeper", "distilled"],
)
def test_weights_of_another_net(path, state, why):
    torch.save(state, path)
    with usage_error(rf"ckpt='{path}': the weights do not fit {VIT} \({why}"):
        start(path)


def test_unknown_model_shows_what_is_near():
    with usage_error(r"model.name='deit_tinny': timm has no such model; closest: .*deit"):
        from_scratch("deit_tinny", {})


def test_all_scales_are_copied_between_equal_recipes():
    source, target = quantized(bits=2), converted(bits=2)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    copied, missing = copy_scales(source, target)
    assert missing == []
    assert copied == [s.name for s in qat.iter_quantizers(target) if s.quantizer.state_dict()]
    assert "blocks.0.attn.qk_quantizer" not in copied  # its scale is read off the weight
    target.load_state_dict(timm_like(source), strict=False)
    assert torch.equal(logits(target), logits(source))


def test_the_scale_of_keys_is_not_that_of_the_product_of_query_key_reparameterization():
    knobs = {"offsets": False, "act_scales": "tensor"}
    source = quantized("lsq", attention="standard", **knobs)
    target = converted("lsq", attention="qkr", **knobs)
    copied, missing = copy_scales(source, target)
    assert {f"blocks.{i}.attn.k_quantizer" for i in (0, 1)} <= set(missing)
    assert "blocks.0.attn.v_quantizer" in copied


def test_scales_of_fp8_are_copied_from_a_frozen_net():
    source, target = quantized("fp8"), converted("fp8")
    copied, _ = copy_scales(source, target)
    assert copied == copy_scales(qat.freeze(source), converted("fp8"))[0]
    assert copied


@pytest.mark.parametrize("steps", ["absolute", "relative"])
def test_trained_step_sizes_are_copied_from_a_frozen_net(steps):
    source = quantized("lsq", steps=steps)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith((".scale", ".change")):
                parameter.add_(0.1)
    target = converted("lsq", steps=steps)
    _, missing = copy_scales(qat.freeze(source), target)
    assert missing == []
    theirs = {site.name: site.quantizer for site in qat.iter_quantizers(source)}
    for site in qat.iter_quantizers(target):
        if site.quantizer.num_stored_scales:
            grid = site.quantizer.grid(site.latent() if site.is_weight else None)
            expected = theirs[site.name].grid(site.latent() if site.is_weight else None)
            assert_close(grid.step, expected.step, rtol=0, atol=0)


def timm_like(net):
    """Everything but quantizer state and the offset in front of the product."""
    return {
        k: v
        for k, v in net.state_dict().items()
        if "_quantizer" not in k and "product_offset" not in k
    }


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        TimeoutError("timed out"),
        http.client.BadStatusLine("hello"),
    ],
)
def test_unreachable_hub_is_said_at_once(monkeypatch, error):
    asked = []

    def fail(request, timeout):
        asked.append(timeout)
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    message = "^model.pretrained=true: .*'deit_tiny_patch16_224'"
    with usage_error(message + r".*model.weights=FILE or model.pretrained=false"):
        from_timm("deit_tiny_patch16_224", {})
    assert time.monotonic() - began < 10
    assert asked == [4]


def test_cached_weights_need_no_hub(monkeypatch, tmp_path):
    net = shake(timm.create_model("deit_tiny_patch16_224", depth=1))
    torch.save(net.state_dict(), tmp_path / "model.bin")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "model.bin")
    )
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked the hub"))
    made = from_timm("deit_tiny_patch16_224", {"depth": 1})
    assert made.notes == ["timm's pretrained weights of deit_tiny_patch16_224 (cached)"]
    assert not differing(made.net.state_dict(), net.state_dict())
    with usage_error("^model.pretrained=true: .* do not fit .*model.weights=FILE"):
        from_timm("deit_tiny_patch16_224", {"depth": 2})


def test_learned_steps_take_the_grids_of_post_training_quantization():
    recipe = qat.PtqRecipe(
        placement="inputs",
        bits=4,
        act_bits=4,
        weight_signed=True,
        act_signed=True,
        stem_bits=8,
        head_bits=8,
        outer_act_bits=8,
    )
    source, target = fitted(vit(), images(), recipe), converted("deploy_w4a4")
    copied, missing = copy_scales(source, target)
    # Behind GELU learned steps have codes from 0 up.
    assert missing == [f"blocks.{i}.mlp.fc2.input_quantizer" for i in range(2)]
    assert len(copied) == len(sites(target)) - 2
    for name in copied:
        site = sites(source)[name]
        x = site.latent() if site.is_weight else torch.randn(4, 16, 32)
        if site.role == "probs":
            x = x.abs() / x.abs().max()
        assert_close(sites(target)[name].quantizer(x), site.quantizer(x), rtol=0, atol=1e-6)
