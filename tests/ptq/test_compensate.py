"""Compensation. Oracle: the normal equations, and numpy's least squares for the matrix; codes of weights that stay."""

import contextlib
import copy

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

import qat
from qat.model.cost import size_bytes
from qat.ptq.compensate import RIDGE, _ridge_gain, compensate
from qat.ptq.units import Runner
from tests import tiny
from tests.ptq.fitting import KNOBS, error, outputs, pair

IMAGES = [tiny.images(16, seed) for seed in range(3)]
ALL = torch.cat(IMAGES)


def test_a_channel_is_left_with_the_mean_of_the_float_net_and_no_gain_to_win():
    net, reference = pair()
    compensate(net, reference, IMAGES)
    for layer in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc2", "head"):
        y, target = (outputs(n, layer, ALL).flatten(0, -2).double() for n in (net, reference))
        assert_close(y.mean(0), target.mean(0), rtol=0, atol=1e-5)
        covariance = ((y - y.mean(0)) * (target - y)).mean(0)
        # What the ridge leaves over: RIDGE (1 - g) / g of the variance, with gains down to 0.1.
        assert (covariance.abs() <= 10 * RIDGE * (y - y.mean(0)).square().mean(0) + 1e-6).all()


def test_codes_of_weights_stay_and_nothing_is_added():
    net, reference = pair()
    before = {s.name: s.quantizer.codes(s.latent()) for s in qat.iter_quantizers(net) if s.is_weight}
    size = size_bytes(net)
    done = compensate(net, reference, IMAGES)
    assert (done.layers, done.matrices, done.added_bytes, size_bytes(net)) == (10, 0, 0, size)
    for site in qat.iter_quantizers(net):
        if site.is_weight:
            same = site.quantizer.codes(site.latent()) == before[site.name]
            assert same.float().mean() > 0.999  # a product and a quotient may round over a tie


@pytest.mark.parametrize("bits", [6, 4, 3])
def test_the_logits_come_closer(bits):
    net, reference = pair(bits=bits, act_bits=bits)
    before = error(net, reference, ALL)
    compensate(net, reference, IMAGES)
    assert error(net, reference, ALL) < before


def test_a_matrix_is_the_ridge_regression_of_the_block_and_is_counted():
    affine, reference = pair()
    net, _ = pair(compensation="matrix")
    compensate(affine, reference, IMAGES)
    done = compensate(net, reference, IMAGES, matrix=True)
    assert (done.matrices, done.added_bytes) == (2, 2 * (32 * 32 + 32) * 4)
    assert size_bytes(net) - size_bytes(affine) == done.added_bytes
    x = outputs(affine, "pos_drop", ALL).flatten(0, -2).double().numpy()
    wrong = (outputs(reference, "blocks.0", ALL) - outputs(affine, "blocks.0", ALL)).flatten(0, -2).double().numpy()
    rows = np.c_[x, np.ones(len(x))]
    gram = rows.T @ rows
    solution = np.linalg.solve(gram + np.diag([RIDGE * np.diag(gram)[:-1].mean()] * 32 + [0.0]), rows.T @ wrong)
    assert_close(net.blocks[0].compensation.weight.double().detach().numpy(), solution[:-1].T, rtol=1e-3, atol=1e-5)


class WholeForwards(Runner):
    """Nothing remembered."""

    def __init__(self, net, _, batches):
        super().__init__(net, (), batches)

    def at(self, unit):
        return contextlib.nullcontext()

    def __call__(self, i):
        return self.net(self.batches[i])


def test_matrices_are_fitted_to_what_blocks_get(monkeypatch):
    """Behind blocks that have their matrices already."""
    knobs = {"compensation": "matrix", "kwargs": {"depth": 4}}
    (net, reference), (whole, _) = pair(**knobs), pair(**knobs)
    compensate(net, reference, IMAGES, matrix=True)
    monkeypatch.setattr("qat.ptq.compensate.Runner", WholeForwards)
    compensate(whole, reference, IMAGES, matrix=True)
    for ours, theirs in zip(net.blocks, whole.blocks, strict=True):
        assert_close(ours.compensation.weight, theirs.compensation.weight, rtol=1e-4, atol=1e-6)


def test_a_channel_that_is_constant_has_no_gain():
    y = torch.linspace(0.1, 1, 1000).double()
    sums = torch.zeros(4, 1000, dtype=torch.float64)
    for _ in range(700):
        target = y + 1e-3 * torch.randn(1000, generator=torch.Generator().manual_seed(_)).double()
        sums += torch.stack([y, target, y.square(), y * target])
    mean_y, mean_t, square, product = sums / 700
    assert (_ridge_gain(square - mean_y.square(), product - mean_y * mean_t, square) == 1).all()


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_layers_that_the_float_net_has_no_module_call_for(name, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    reference = timm.create_model(name, img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=6).eval()
    images = torch.randn(16, 3, 16, 16)
    net = qat.convert(copy.deepcopy(reference), qat.PtqRecipe(**KNOBS, method="compensate"), input_size=(3, 16, 16))
    qat.ptq.calibrate(net, [images])
    before = error(net.eval(), reference, images)
    compensate(net, reference, [images])
    assert error(net, reference, images) < before
    assert "blocks.1.attn.qkv" in caplog.text or "blocks.1.attn.q_proj" in caplog.text


@pytest.mark.parametrize("compensation", ["affine", "matrix"])
def test_a_file_gives_back_the_same_net(tmp_path, compensation):
    net, reference = pair(compensation=compensation)
    compensate(net, reference, IMAGES, matrix=compensation == "matrix")
    qat.save(net, tmp_path / "quantized.ckpt")
    assert torch.equal(tiny.logits(qat.load(tmp_path / "quantized.ckpt"), ALL), tiny.logits(net, ALL))


def test_one_scale_for_a_weight_takes_a_bias_alone():
    net, reference = pair(weight_scales="tensor")
    weight = net.blocks[0].mlp.fc2.weight.clone()
    compensate(net, reference, IMAGES)
    assert torch.equal(net.blocks[0].mlp.fc2.weight, weight)
    y, target = (outputs(n, "blocks.0.mlp.fc2", ALL).flatten(0, -2).mean(0) for n in (net, reference))
    assert_close(y, target, rtol=0, atol=1e-5)


def test_activations_that_are_not_finite_are_refused():
    net, reference = pair()
    with torch.no_grad():
        reference.blocks[1].mlp.fc1.bias[0] = torch.inf
    with pytest.raises(qat.UsageError, match=r"the activations of blocks\.1 hold NaN or infinity"):
        compensate(net, reference, IMAGES)


def test_a_net_without_blocks_is_refused():
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    net = qat.convert(linear, qat.PtqRecipe(placement="inputs", method="compensate"), input_size=tiny.SIZE)
    qat.ptq.calibrate(net, IMAGES)
    with pytest.raises(qat.UsageError, match=r"^ptq\.method='compensate': this net has no blocks"):
        compensate(net, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), IMAGES)
