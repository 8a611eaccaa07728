"""The gradient of a step size, straight through the rounding, is the derivative that a mean over many values has.

For one value the output jumps where the code changes, and its true derivative is the code. In a mean of h(x) Q(x; s) over a dense set of
values the jumps become a slope, -h(x) x / s per value, and both together are what LSQ (arXiv 1902.08153) takes for the gradient: codes
minus x / s in the range, the outermost code outside. Oracle: central differences of that mean, with thresholds so many that a sum over
them is an integral, and a step so wide that thousands of values cross one.
"""

import math

import pytest
import torch

from qat import functional as F

N = 400_001
WIDTH = 0.02


def values():
    """A dense set with more mass on one side, float64 so that differences of means are exact enough."""
    grid = torch.linspace(-3, 3, N, dtype=torch.float64)
    return (grid + 0.15 * grid.square()).float()


def weighted_mean(output, x):
    """A mean with a smooth weight, as a net's next layers would give it."""
    return (output.double() * (torch.sin(x.double()) + 0.3 * x.double() + 0.2)).mean()


def affine(x, scale):
    return F.fake_quantize_affine(x, scale, torch.tensor([24.0]), 0, 63, None)


def lsq(x, scale):
    return F.lsq(x, scale, -32, 31, None)


def central_difference(quantize, x, scale):
    above, below = (weighted_mean(quantize(x, torch.tensor([scale * (1 + side * WIDTH)])), x) for side in (1, -1))
    return float(above - below) / (2 * WIDTH * scale)


@pytest.mark.parametrize("scale", [0.02, 0.03, 0.05])
@pytest.mark.parametrize(("quantize", "factor", "close"), [(affine, 1.0, 0.03), (lsq, 1 / math.sqrt(31 * N), 2e-3)])
def test_agrees_with_differences_of_a_mean(quantize, factor, close, scale):
    """`lsq` scales its gradient by 1 / sqrt(qmax m). `affine` calls a value outside half a step later: it is less close."""
    x, step = values(), torch.tensor([scale], requires_grad=True)
    weighted_mean(quantize(x, step), x).backward()
    expected = central_difference(quantize, x, scale)
    assert expected > 10
    assert float(step.grad) / factor == pytest.approx(expected, rel=close)
