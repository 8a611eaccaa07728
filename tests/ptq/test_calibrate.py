"""Calibration of a whole net, and its observers.

Oracle: statistics of the float net's own tensors, caught by hooks here; formulas of FQ-ViT written out.
"""

import copy
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.functional.observers import RangeState, extend_to_zero, observe
from qat.model.ptq_spec import PtqRecipe
from qat.model.scales import is_ready
from qat.ptq import calibrate, in_float
from qat.quantizers import build_quantizer
from qat.spec import QuantSpec
from tests.errors import usage_error
from tests.tiny import (
    VIT,
    convert,
    identical,
    images,
    logits,
    parameters,
    quantized,
    sites,
    vit,
    watched,
    with_scales,
)


def converted(name=VIT, **knobs):
    return convert(vit(name), PtqRecipe(**knobs))


def ptq(name=VIT, n=2, **knobs):
    """A calibrated net."""
    net = converted(name, **knobs)
    calibrate(net, [images(seed=i) for i in range(n)])
    return net


@pytest.mark.parametrize("placement", ["inputs", "fqvit"])
def test_every_range_is_that_of_the_float_net(placement):
    net = ptq(placement=placement)
    with in_float(net):
        seen = [watched(net, partial(logits, x=images(seed=seed))) for seed in (0, 1)]
    for site in qat.iter_quantizers(net):
        x = (
            site.latent().detach()
            if site.is_weight
            else torch.stack([run[site.name][0] for run in seen])
        )
        rows = x.flatten(1) if site.is_weight else x.flatten().unsqueeze(0)
        low, high = rows.amin(1), rows.amax(1)
        around_zero = (low <= 0) & (high >= 0)  # the others: below
        assert around_zero.float().mean() > 0.7 or site.role == "probs"
        assert_close(
            site.quantizer.scale[around_zero], ((high - low) / 255)[around_zero], rtol=1e-6, atol=0
        )


def test_batches_calibrate_in_any_number_and_a_generator_will_do():
    net = converted()
    done = calibrate(net, (images(n, seed=n) for n in (3, 5, 2)))
    assert (done.images, done.batches) == (10, 3)
    assert done.scales == sum(site.quantizer.num_stored_scales for site in qat.iter_quantizers(net))


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


def test_symmetric_codes_have_no_zero_point():
    by_name = sites(ptq(weight_signed=True, act_signed=True, bits=4, act_bits=4))
    weight = by_name["blocks.0.mlp.fc1.weight_quantizer"]
    codes = weight.quantizer.codes(weight.latent())
    assert not weight.quantizer.zero_point.any()
    assert (codes.amin() >= -8, codes.amax() <= 7) == (True, True)
    assert (codes < 0).any()
    assert not by_name["blocks.0.attn.probs_quantizer"].quantizer.spec.signed


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "knobs",
    [
        {"layernorm": "integer", "residual_observer": "ptf"},
        {"placement": "inputs"},
        {"bias_correction": True},
    ],
)
def test_a_file_gives_the_same_logits_to_the_last_bit(tmp_path, knobs):
    net = ptq(**knobs)
    qat.save(net, tmp_path / "net.ckpt")
    assert torch.equal(logits(qat.load(tmp_path / "net.ckpt")), logits(net))
    assert torch.equal(logits(copy.deepcopy(net)), logits(net))


def test_a_net_that_is_not_calibrated_says_so():
    net = converted()
    assert not is_ready(net.blocks[0].residual1_quantizer)
    with usage_error(r"are not initialized; call qat.ptq.calibrate\(net"):
        logits(net)
    with usage_error(r"does not set affine scales of activations .*; call qat\.ptq\.calibrate"):
        with_scales(net)


@pytest.mark.parametrize(
    ("net", "batches", "message"),
    [
        (converted, [], "batches is empty; must contain at least one batch of images"),
        (converted, [images() * torch.nan], "calibration images contain NaN or infinity"),
        (vit, [images()], "no affine or fp8 scales; convert it first, with a qat.PtqRecipe"),
        (quantized, [images()], "no affine or fp8 scales"),
    ],
)
def test_mistakes(net, batches, message):
    with usage_error(message):
        calibrate(net(), batches)


def test_scales_that_cannot_be_replaced_by_others_stay():
    net = ptq()
    with torch.no_grad():
        net.head.weight.mul_(2)
    before = copy.deepcopy(net.state_dict())
    with usage_error("batches is empty"):
        calibrate(net, [])
    assert identical(net.state_dict(), before)


def test_deviates_from_reference_a_range_far_from_zero_reaches_it():
    # The reference clips the zero point to a code, and what is worth 5.0 to 6.0 would all become 1.0.
    quantizer = build_quantizer(QuantSpec("input", "affine", 8, signed=False, observer="minmax"))
    x = torch.linspace(5, 6, 120).view(4, 5, 6)
    quantizer.allocate(x.shape, x.device)
    quantizer.set_from_range(observe(None, x, None, "minmax"), x)
    assert quantizer(x).sub(x).abs().max() <= quantizer.scale / 2 + 1e-6
    low, high = extend_to_zero(
        RangeState(torch.tensor([0.01, 5.0, -6.0, -1.0]), torch.tensor([1.0, 6.0, -5.0, 1.0]))
    )
    # Next to zero the reference's formula stays.
    assert low.tolist() == pytest.approx([0.01, 0.0, -6.0, -1.0])
    assert high.tolist() == pytest.approx([1.0, 6.0, 0.0, 1.0])
