"""Errors over step sizes. Oracles: optima of KURE's formulas worked out by hand; a million samples."""

import numpy as np
import pytest

from evidence.lemma import UNIFORM_END, best_step, measured_error, normal_error, uniform_error


@pytest.mark.parametrize(
    ("bits", "uniform", "normal", "normal_step"),
    [
        (2, 0.04, 0.0871485, 0.855318),
        (3, 1 / 81, 0.0314294, 0.537898),
        (4, 1 / 289, 0.0104933, 0.319892),
    ],
)
def test_the_best_step_has_the_least_error(bits, uniform, normal, normal_step):
    step = best_step(uniform_error, bits)
    assert step == pytest.approx(2 * UNIFORM_END / (2**bits + 1), rel=1e-4)
    assert uniform_error(step, bits) == pytest.approx(uniform, rel=1e-4)
    step = best_step(normal_error, bits)
    assert step == pytest.approx(normal_step, rel=1e-4)
    assert normal_error(step, bits) == pytest.approx(normal, rel=1e-4)


@pytest.mark.parametrize("ratio", [0.7, 1.0])
def test_the_formula_of_uniform_weights_is_what_samples_have(ratio):
    samples = np.random.default_rng(0).uniform(-UNIFORM_END, UNIFORM_END, 1_000_000)
    step = ratio * best_step(uniform_error, 4)
    assert measured_error(samples, step, 4) == pytest.approx(uniform_error(step, 4), rel=0.01)
