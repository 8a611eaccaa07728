"""Calibration of a whole net. Oracle: statistics of the float net's own tensors, caught by hooks here."""

import copy

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.functional import affine_scale, fake_quantize_affine
from qat.model.ptq_spec import PtqRecipe
from qat.model.scales import is_ready
from qat.ptq import calibrate, in_float
from tests.tiny import DISTILLED, SIZE, VIT, images, logits, parameters, quantized, sites, vit


def converted(name=VIT, **knobs):
    return qat.convert(vit(name), PtqRecipe(**knobs), input_size=SIZE)


def ptq(name=VIT, n=2, **knobs):
    """A calibrated net."""
    net = converted(name, **knobs)
    calibrate(net, [images(seed=i) for i in range(n)])
    return net


@pytest.mark.parametrize("placement", ["inputs", "fqvit"])
def test_every_range_is_that_of_the_float_net(placement):
    net, seen = ptq(placement=placement), {}
    handles = [
        site.quantizer.register_forward_pre_hook(lambda _, args, name=site.name: seen.setdefault(name, []).append(args[0]))
        for site in qat.iter_quantizers(net)
        if not site.is_weight
    ]
    with in_float(net):
        logits(net, images(seed=0)), logits(net, images(seed=1))
    for handle in handles:
        handle.remove()
    for site in qat.iter_quantizers(net):
        x = site.latent().detach() if site.is_weight else torch.stack(seen[site.name])
        rows = x.flatten(1) if site.is_weight else x.flatten().unsqueeze(0)
        low, high = rows.amin(1), rows.amax(1)
        around_zero = (low <= 0) & (high >= 0)  # the others: test_observers.py
        assert around_zero.float().mean() > 0.7 or site.role == "probs"
        assert_close(site.quantizer.scale[around_zero], ((high - low) / 255)[around_zero], rtol=1e-6, atol=0)


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "omse", "mse"])
def test_the_same_batches_give_the_same_scales(observer):
    knobs = {"weight_observer": "omse", "act_observer": observer, "residual_observer": "ptf"}
    first, again = ptq(**knobs).state_dict(), ptq(**knobs).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_batches_calibrate_in_any_number_and_a_generator_will_do():
    net = converted()
    done = calibrate(net, (images(n, seed=n) for n in (3, 5, 2)))
    assert (done.images, done.batches) == (10, 3)
    assert done.scales == sum(site.quantizer.n_scales for site in qat.iter_quantizers(net))
    assert done.observers == {"minmax": len(list(qat.iter_quantizers(net)))}


def test_calibrating_again_replaces_the_scales():
    net = ptq()
    before = copy.deepcopy(net.state_dict())
    calibrate(net, [3 * images(seed=5)])
    name = "patch_embed.proj.input_quantizer.scale"
    assert_close(net.state_dict()[name], before[name] * 3, rtol=0.5, atol=0)
    calibrate(net, [images(seed=i) for i in range(2)])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_weights_gradients_and_modes_stay():
    net = converted()
    net.train()
    net.blocks[0].eval()
    modes = [m.training for m in net.modules()]
    weights, names = copy.deepcopy(dict(net.named_parameters())), parameters(net)
    calibrate(net, [images()])
    assert parameters(net) == names
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in net.named_parameters())
    assert [m.training for m in net.modules()] == modes


def test_deviates_from_reference_integer_norms_give_way_where_the_net_runs_in_float():
    # There they stay integer, and what should be float logits are off.
    net = ptq(layernorm="integer", residual_observer="ptf", bits=3)
    rounded = logits(net)
    with in_float(net):
        assert_close(logits(net), logits(vit()), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(net), rounded)
    assert not any("forward" in vars(m) for m in net.modules())


@pytest.mark.parametrize("name", [VIT, DISTILLED])
@pytest.mark.parametrize("placement", ["inputs", "fqvit"])
def test_more_bits_come_closer_to_the_float_net(name, placement):
    few, many = ((logits(ptq(name, bits=b, act_bits=b, placement=placement)) - logits(vit(name))).norm() for b in (3, 8))
    assert few > 5 * many


def test_bits_of_weights_activations_and_probabilities_are_their_own():
    by_name = sites(ptq(bits=3, act_bits=6, softmax_bits=4, overrides={"head": {"bits": 8, "act_bits": 7}}))
    bits = {name: site.quantizer.spec.bits for name, site in by_name.items()}
    assert bits["blocks.0.attn.qkv.weight_quantizer"] == bits["patch_embed.proj.weight_quantizer"] == 3
    assert bits["blocks.0.attn.qkv.input_quantizer"] == bits["blocks.1.residual2_quantizer"] == 6
    assert bits["blocks.0.attn.probs_quantizer"] == 4
    assert (bits["head.weight_quantizer"], bits["head.input_quantizer"]) == (8, 7)
    codes = by_name["patch_embed.proj.input_quantizer"].quantizer.codes(100 * images())
    assert (codes.min(), codes.max()) == (0, 63)


def test_symmetric_codes_have_no_zero_point():
    by_name = sites(ptq(weight_signed=True, act_signed=True, bits=4, act_bits=4))
    weight = by_name["blocks.0.mlp.fc1.weight_quantizer"]
    codes = weight.quantizer.codes(weight.latent())
    assert not weight.quantizer.zero_point.any()
    assert (codes.amin() >= -8, codes.amax() <= 7) == (True, True)
    assert (codes < 0).any()
    assert not by_name["blocks.0.attn.probs_quantizer"].quantizer.spec.signed


@pytest.mark.parametrize(("scales", "n"), [("tensor", 1), ("token", 17), ("channel", 32)])
def test_activations_may_have_a_scale_per_token_or_channel(scales, n):
    by_name = sites(ptq(act_scales=scales))
    assert by_name["blocks.0.mlp.fc1.input_quantizer"].quantizer.n_scales == n
    assert by_name["blocks.0.attn.scores_quantizer"].quantizer.n_scales == {"tensor": 1, "token": 17, "channel": 2}[scales]


@pytest.mark.parametrize("observer", ["minmax", "omse", "mse"])
def test_weights_may_have_one_scale(observer):
    site = sites(ptq(bits=3, weight_scales="tensor", weight_observer=observer))["blocks.0.mlp.fc1.weight_quantizer"]
    w = site.latent().detach()
    scale, zero = affine_scale(w, 3, False, None, observer)
    assert_close(site.quantizer(w), fake_quantize_affine(w, scale, zero, 0, 7, None))
    assert site.quantizer.n_scales == 1


def test_weights_alone():
    net = ptq(bits=3, act_quantizer="float", act_bits=32)
    assert {site.quantizer.spec.bits for site in sites(net).values() if not site.is_weight} == {32}
    assert {site.quantizer.spec.bits for site in sites(net).values() if site.is_weight} == {3}


def test_bias_correction_keeps_mean_and_spread_of_every_channel():
    site = sites(ptq(bits=3, bias_correction=True))["blocks.0.attn.proj.weight_quantizer"]
    w = site.latent().detach()
    q = site.quantizer(w)
    assert_close(q.mean(1), w.mean(1), rtol=1e-4, atol=1e-6)
    assert_close(q.std(1), w.std(1), rtol=1e-4, atol=1e-6)


def test_log2_probabilities_are_powers_of_two():
    net = ptq(softmax_quantizer="log2", softmax_bits=4)
    caught = []
    net.blocks[0].attn.probs_quantizer.register_forward_hook(lambda _, args, out: caught.append(out))
    logits(net)
    (probs,) = caught
    assert set(probs.unique().tolist()) <= {0.0, *(2.0**-k for k in range(16))}


@pytest.mark.parametrize(
    "knobs", [{"layernorm": "integer", "residual_observer": "ptf"}, {"placement": "inputs"}, {"bias_correction": True}]
)
def test_a_file_gives_the_same_logits_to_the_last_bit(tmp_path, knobs):
    net = ptq(**knobs)
    qat.save(net, tmp_path / "net.ckpt")
    assert torch.equal(logits(qat.load(tmp_path / "net.ckpt")), logits(net))
    assert torch.equal(logits(copy.deepcopy(net)), logits(net))


def test_a_net_that_is_not_calibrated_says_so():
    net = converted()
    assert not is_ready(net.blocks[0].residual1_quantizer)
    with pytest.raises(qat.UsageError, match=r"are not initialised; call qat.ptq.calibrate\(net"):
        logits(net)
    with pytest.raises(qat.UsageError, match="are found by qat.ptq.calibrate"):
        qat.initialize_scales(net, [images()])


@pytest.mark.parametrize(
    ("net", "batches", "message"),
    [
        (converted, [], "there is no batch of images"),
        (converted, [images() * torch.nan], "calibration images hold NaN or infinity"),
        (vit, [images()], "no affine quantizer; convert it with a qat.PtqRecipe first"),
        (quantized, [images()], "no affine quantizer"),
    ],
)
def test_mistakes(net, batches, message):
    with pytest.raises(qat.UsageError, match=message):
        calibrate(net(), batches)
