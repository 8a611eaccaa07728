"""Closed forms of rounding noise. Oracles: our quantizers on fine meshes, numeric derivatives, published constants."""

import math

import pytest
import torch

from qat import functional as F
from qat.functional import rounding_noise as noise
from tests import golden

PTQ = "ptq_goldens.npz"
SQRT3 = math.sqrt(3)
NORMAL = {  # bits: step, error, dB, curvature
    2: (0.855318, 0.0871485, 10.60, 0.864),
    3: (0.537898, 0.0314294, 15.03, 1.172),
    4: (0.319892, 0.0104933, 19.79, 1.510),
    6: (0.102716, 0.00101292, 29.94, 2.241),
    8: (0.030657, 8.708e-5, 40.60, 3.020),
}
UNIFORM = {2: (0.04, 13.98), 3: (0.0123457, 19.08), 4: (0.00346021, 24.61), 6: (0.000236686, 36.26), 8: (1.5140e-5, 48.20)}
RATIOS = (0.7, 0.8, 0.9, 1.1, 1.2, 1.3)
GROWTH = {"uniform": (11.80, 4.84, 1.72, 1.21, 1.44, 1.69), "normal": (2.40, 1.48, 1.09, 1.06, 1.20, 1.38)}
BITS = tuple(NORMAL)


def quantiles(n=1_000_000):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def uniform(half_width=1.0):
    return (half_width * (2 * quantiles() - 1)).float()


def measured(x, step, bits, quantize):
    return (quantize(x, torch.tensor([step]), bits) - x).double().square().mean().item()


def measured_normal(step, bits):
    """Integral over a fine mesh, weighted with the density."""
    x = torch.linspace(-9, 9, 1_000_001)
    error = (affine(x, torch.tensor([step]), bits) - x).double().square()
    return (error * torch.exp(-x.double().square() / 2)).sum().item() * 18e-6 / math.sqrt(2 * math.pi)


def affine(x, step, bits):
    n = 2 ** (bits - 1)
    return F.fake_quantize_affine(x, step, torch.zeros(1), -n, n, None)


def lsq(x, step, bits):
    n = 2 ** (bits - 1)
    return F.lsq(x, step, -n, n, None)


def numeric_curvature(mse, step, bits):
    h = 1e-3 * step
    return (mse(step + h, bits) - 2 * mse(step, bits) + mse(step - h, bits)) / h**2


@pytest.mark.parametrize("quantize", [affine, lsq])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("ratio", [0.7, 0.9, 1.0])
def test_our_quantizers_have_the_error_of_a_uniform_tensor(bits, ratio, quantize):
    step = ratio * noise.uniform_best_step(bits)
    assert measured(uniform(), step, bits, quantize) == pytest.approx(noise.uniform_mse(step, bits), rel=1e-3)


def exact_normal_mse(step, bits):
    """The integral cell by cell, without taking the error of a cell for step^2 / 12."""
    n, phi, mass = 2 ** (bits - 1), (lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)), (lambda x: math.erf(x / math.sqrt(2)) / 2)

    def part(low, high, c):
        ends = low * phi(low) - (high * phi(high) if high < math.inf else 0.0) - 2 * c * (phi(low) - phi(high))
        return (1 + c * c) * (mass(high) - mass(low)) + ends

    inner = [part((k - 0.5) * step, (k + 0.5) * step, k * step) for k in range(1 - n, n)]
    return sum(inner) + 2 * part((n - 0.5) * step, math.inf, n * step)


@pytest.mark.parametrize(("bits", "approximation"), [(2, 0.060), (3, 0.024), (4, 0.0090), (6, 0.0015)])
def test_our_quantizers_have_the_error_of_a_normal_tensor(bits, approximation):
    step = noise.normal_best_step(bits)
    exact = exact_normal_mse(step, bits)
    assert measured_normal(step, bits) == pytest.approx(exact, rel=1e-4)
    assert noise.normal_mse(step, bits) == pytest.approx(exact, rel=approximation), "the wider the cells, the coarser the closed form"


@pytest.mark.parametrize("bits", BITS)
def test_statsq_is_the_best_grid_of_a_uniform_tensor(bits):
    # Its scale is the half-width; 2^bits cells without clipping have 4^-bits of the variance, 6.02 dB a bit.
    x = uniform(3.0).unsqueeze(0)
    mse = (F.statsq(x, bits) - x).double().square().mean().item()
    assert mse == pytest.approx(3.0**2 / (3 * 4**bits), rel=1e-3)
    assert noise.snr_db(3.0, mse) == pytest.approx(6.0206 * bits, abs=0.01)
    assert noise.uniform_mse(6.0 / 2**bits, bits, 3.0) == pytest.approx(3.0**2 / (3 * 4**bits))


@golden.parametrize(PTQ, r"(kure/)?lemma/uniform/M\d+")
def test_golden_best_step(case):
    bits = int(case.rpartition("M")[2])
    step = noise.uniform_best_step(bits)
    found = {"opt_step": step, "opt_mse": noise.uniform_mse(step, bits), "second_derivative": noise.uniform_curvature(step, bits)}
    for key, value in found.items():
        if golden.has(PTQ, f"{case}/{key}"):
            assert value == pytest.approx(golden.number(PTQ, f"{case}/{key}"), rel=1e-12)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("half_width", [1.0, SQRT3, 40.0])
def test_best_step_of_a_uniform_tensor(bits, half_width):
    step = noise.uniform_best_step(bits, half_width)

    def mse(s, b):
        return noise.uniform_mse(s, b, half_width)

    assert mse(step, bits) == pytest.approx(step**2 / 12) == pytest.approx(half_width**2 / (3 * (2**bits + 1) ** 2))
    others = [r * step for r in (0.5, 0.9, 0.99, 0.999, 1.001, 1.01, 1.1, 2.0)]
    assert mse(step, bits) < min(mse(s, bits) for s in others)
    # The other root of the cubic's slope is a maximum, and there nothing is clipped.
    assert noise.clip_of(2 * half_width / (2**bits - 1), bits) > half_width
    assert noise.uniform_curvature(step, bits, half_width) == pytest.approx(2 ** (bits - 1))
    assert noise.uniform_curvature(step, bits, half_width) == pytest.approx(numeric_curvature(mse, step, bits), rel=1e-6)
    assert noise.uniform_curvature(2 * half_width / 2**bits, bits, half_width) == pytest.approx(0.5)
    assert noise.uniform_curvature(2 * half_width / (2**bits - 2.0**-bits), bits, half_width) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("bits", BITS)
def test_best_step_of_a_normal_tensor(bits):
    step, mse, db, curvature = NORMAL[bits]
    best = noise.normal_best_step(bits)
    assert best == pytest.approx(step, abs=1e-6)
    assert noise.normal_mse(best, bits) == pytest.approx(mse, rel=1e-4)
    assert noise.snr_db(1.0, noise.normal_mse(best, bits)) == pytest.approx(db, abs=0.005)
    assert noise.normal_curvature(best, bits) == pytest.approx(curvature, abs=6e-4)
    assert noise.normal_curvature(best, bits) == pytest.approx(numeric_curvature(noise.normal_mse, best, bits), rel=1e-4)
    assert noise.normal_best_step(bits, 5.0) == pytest.approx(5 * best)
    assert noise.normal_mse(5 * best, bits, 5.0) == pytest.approx(25 * noise.normal_mse(best, bits))
    assert noise.normal_curvature(5 * best, bits, 5.0) == pytest.approx(noise.normal_curvature(best, bits))


@pytest.mark.parametrize("bits", BITS)
def test_a_uniform_tensor_of_the_same_variance_has_less_noise(bits):
    mse, db = UNIFORM[bits]
    step = noise.uniform_best_step(bits, SQRT3)
    found = noise.uniform_mse(step, bits, SQRT3)
    assert found == pytest.approx(mse, rel=1e-4)
    assert noise.snr_db(1.0, found) == pytest.approx(db, abs=0.005)
    gain = noise.snr_db(1.0, found) - noise.snr_db(1.0, noise.normal_mse(noise.normal_best_step(bits), bits))
    assert 3.3 < gain < 7.7


def test_steps_that_are_off():
    best = {"uniform": noise.uniform_best_step(4, SQRT3), "normal": noise.normal_best_step(4)}
    mse = {"uniform": lambda s, b: noise.uniform_mse(s, b, SQRT3), "normal": noise.normal_mse}
    for kind, expected in GROWTH.items():
        assert [noise.relative_error(mse[kind], best[kind], r, 4) for r in RATIOS] == pytest.approx(expected, abs=0.006)

    def grown(kind, ratio, bits=4):
        return mse[kind](ratio * step(kind, bits), bits) - mse[kind](step(kind, bits), bits)

    def step(kind, bits):
        return noise.uniform_best_step(bits, SQRT3) if kind == "uniform" else noise.normal_best_step(bits)

    # One-sided: too wide a step costs a uniform tensor less, too narrow a one costs it more.
    assert grown("uniform", 1.2) == pytest.approx(1.52e-3, rel=5e-3)
    assert grown("normal", 1.2) == pytest.approx(2.10e-3, rel=5e-3)
    assert grown("uniform", 0.8) == pytest.approx(1.33e-2, rel=5e-3)
    assert grown("normal", 0.8) == pytest.approx(4.99e-3, rel=5e-3)
    assert all(grown("uniform", r, b) < grown("normal", r, b) for b in (4, 6, 8) for r in (1.2, 1.3))
    # Close to the optimum that takes more bits.
    assert grown("uniform", 1.1) > grown("normal", 1.1)
    assert all(grown("uniform", 1.1, b) < grown("normal", 1.1, b) for b in (6, 8))


@pytest.mark.parametrize("bits", [4, 6])
def test_growth_to_second_order(bits):
    # Lemma 1: |MSE''| e^2 / 2.
    step, shift = noise.normal_best_step(bits), 1e-4 * noise.normal_best_step(bits)
    grown = noise.normal_mse(step + shift, bits) - noise.normal_mse(step, bits)
    assert grown == pytest.approx(noise.normal_curvature(step, bits) * shift**2 / 2, rel=1e-3)
