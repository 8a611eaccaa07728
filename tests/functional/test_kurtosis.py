"""Kurtosis and KURE. Oracles: the paper's code (goldens), float64 formulas."""

import pytest
import torch
from torch.testing import assert_close

from qat.functional import kure_loss, kurtoses, kurtosis
from tests import golden
from tests.tiny import randn

PTQ = "ptq_goldens.npz"
FORWARD, GRADIENT = {"rtol": 1e-6, "atol": 1e-6}, {"rtol": 1e-5, "atol": 1e-5}


def in_float64(w):
    """Kurtosis and its gradient, written out."""
    w = w.double()
    n, std = w.numel(), w.std()
    z = (w - w.mean()) / std
    k = (z**4).mean()
    return k, 4 / (n * std) * (z**3 - (z**3).mean()) - 4 * k * z / (std * (n - 1))


def with_gradient(w, function=kurtosis):
    w = w.detach().requires_grad_()
    value = function(w)
    value.backward()
    return value.detach(), w.grad


def exponential(n, seed=0):
    return torch.empty(n).exponential_(generator=torch.Generator().manual_seed(seed))


@golden.parametrize(PTQ, r"kure/(?!in$|multi$)[^/]+")
def test_one_layer(case):
    name = case.removeprefix("kure/")
    w = golden.tensor(PTQ, f"kure/in/{name}")
    expected = golden.below(PTQ, case)
    if "kurtosis" in expected:
        assert_close(kurtosis(w), expected["kurtosis"].reshape(()), **FORWARD)
    for key in expected:
        if key.startswith("loss_t"):
            target = key.removeprefix("loss_t")
            loss, grad = with_gradient(w, lambda t, target=target: kure_loss([t], float(target)))
            assert_close(loss, expected[key].reshape(()), **FORWARD)
            assert_close(grad, expected[f"grad_t{target}"], **GRADIENT)


@golden.parametrize(PTQ, "kure/multi")
def test_several_layers(case):
    names = "normal", "uniform", "laplace", "conv"
    weights = [golden.tensor(PTQ, f"kure/in/{name}") for name in names]
    expected = golden.below(PTQ, case)
    if "per_layer" in expected:
        per_layer = torch.stack([kure_loss([w]) for w in weights])
        assert_close(per_layer, expected["per_layer"], **FORWARD)
    for reduction in expected.keys() & {"mean", "sum", "max"}:
        loss = kure_loss(weights, reduction=reduction)
        assert_close(loss, expected[reduction].reshape(()), **FORWARD)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e10])
def test_far_from_zero_tiny_or_huge_weights_lose_no_digits(offset, scale):
    w = (exponential(768 * 192) + offset) * scale
    value, grad = with_gradient(w)
    expected, expected_grad = in_float64(w)
    assert value.item() == pytest.approx(expected.item(), rel=2e-6)
    assert (grad - expected_grad).abs().max() < 2e-6 * expected_grad.abs().max()


def test_the_gradient_of_every_tensor_of_several():
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((3, 4), (2, 2, 3), (7,))
    ]
    assert torch.autograd.gradcheck(lambda *t: kurtoses(t), weights)


@pytest.mark.parametrize(
    ("shape", "value"), [((4, 3), 0.0), (1000, 0.1), (7, 1e-45), (1, 1.0), ((), 3.0)]
)
def test_deviates_from_reference_a_constant_weight_has_a_kurtosis(shape, value):
    # There it is 0/0.
    w = torch.full(shape if isinstance(shape, tuple) else (shape,), value)
    value, grad = with_gradient(w)
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(w))


def test_it_is_float32_in_half_precision():
    w = randn(64, 48)
    value, half = with_gradient(w.half())
    assert value.dtype == torch.float32
    assert_close(value, kurtosis(w.half().float()), rtol=0, atol=0)
    assert half.dtype == torch.float16
    assert kurtosis(w.double()).dtype == torch.float64
