"""Compensation. Oracle: the normal equations; codes of weights that stay."""

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.model.cost import size_bytes
from qat.ptq.compensate import RIDGE, compensate
from qat.ptq.reconstruct import ReconstructSettings, reconstruct
from qat.ptq.search import SearchSettings, search
from tests import tiny
from tests.errors import usage_error
from tests.nets import FAMILIES
from tests.ptq.fitting import calibrated, error, outputs, pair
from tests.ptq.ties import NEAR

IMAGES = [tiny.images(16, seed) for seed in range(3)]
ALL = torch.cat(IMAGES)


def test_a_channel_is_left_with_the_mean_of_the_float_net_and_no_gain_to_win():
    net, reference = pair()
    compensate(net, reference, IMAGES)
    for layer in (
        "patch_embed.proj",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.1.mlp.fc2",
        "head",
    ):
        y, target = (outputs(n, layer, ALL).flatten(0, -2).double() for n in (net, reference))
        assert_close(y.mean(0), target.mean(0), rtol=0, atol=1e-5)
        covariance = ((y - y.mean(0)) * (target - y)).mean(0)
        # What the ridge leaves over: RIDGE (1 - g) / g of the variance, with gains down to 0.1.
        assert (covariance.abs() <= 10 * RIDGE * (y - y.mean(0)).square().mean(0) + 1e-6).all()


@pytest.mark.parametrize(
    "knobs", [{}, {"method": "calibrate", "bits": 4, "weight_quantizer": "nvfp4"}]
)
def test_codes_of_weights_stay_and_nothing_is_added(knobs):
    net, reference = pair(**knobs)
    before = {
        s.name: s.quantizer.codes(s.latent()) for s in qat.iter_quantizers(net) if s.is_weight
    }
    size = size_bytes(net)
    done = compensate(net, reference, IMAGES)
    assert (done, size_bytes(net)) == (10, size)
    for site in qat.iter_quantizers(net):
        if site.is_weight:
            weight = site.latent()
            differs = site.quantizer.codes(weight) != before[site.name]
            # A product and a quotient may round over a threshold.
            place = (
                site.quantizer.grid(weight).to_code_coordinates(weight)[differs]
                if differs.any()
                else torch.empty(0)
            )
            assert ((place - place.floor() - 0.5).abs() < NEAR).all()


@pytest.mark.parametrize("name", ["beit", "eva02"])
def test_layers_that_the_float_net_has_no_module_call_for(name, caplog):
    caplog.set_level("INFO")
    reference = FAMILIES[name].build()
    images = FAMILIES[name].images(16)
    net = calibrated(reference, images, "compensate")
    before = error(net, reference, images)
    compensate(net, reference, [(images, None)])  # as a loader gives them
    assert error(net, reference, images) < before
    assert "blocks.1.attn.qkv" in caplog.text or "blocks.1.attn.q_proj" in caplog.text


def test_files_of_before_load(tmp_path):
    net, reference = pair()
    compensate(net, reference, IMAGES)
    qat.save(net, tmp_path / "quantized.ckpt")
    content = torch.load(tmp_path / "quantized.ckpt", weights_only=True)
    content["qat"]["recipe"]["compensation"] = "affine"
    torch.save(content, tmp_path / "older.ckpt")
    assert torch.equal(tiny.logits(qat.load(tmp_path / "older.ckpt"), ALL), tiny.logits(net, ALL))


def test_one_scale_for_a_weight_takes_a_bias_alone():
    net, reference = pair(weight_scales="tensor")
    weight = net.blocks[0].mlp.fc2.weight.clone()
    compensate(net, reference, IMAGES)
    assert torch.equal(net.blocks[0].mlp.fc2.weight, weight)
    y, target = (
        outputs(n, "blocks.0.mlp.fc2", ALL).flatten(0, -2).mean(0) for n in (net, reference)
    )
    assert_close(y, target, rtol=0, atol=1e-5)


def one_step(net, reference, batches):
    """Reconstruction at its shortest."""
    reconstruct(net, reference, torch.cat(batches), ReconstructSettings(steps=1, batch=16))


@pytest.mark.parametrize("fit", [compensate, one_step])
def test_activations_that_are_not_finite_are_refused(fit):
    net, reference = pair(method="reconstruct")
    with torch.no_grad():
        reference.blocks[1].mlp.fc1.bias[0] = torch.inf
    with usage_error(r"the activations of blocks\.1 are NaN or infinite"):
        fit(net, reference, IMAGES)
    with usage_error("the float net is quantized"):
        fit(net, net, IMAGES)


def test_no_images_are_refused():
    net, reference = pair(method="compensate")
    for fit in (
        lambda: compensate(net, reference, []),
        lambda: search(net, [], [], SearchSettings()),
    ):
        with usage_error("batches is empty; must contain at least one batch of images"):
            fit()
