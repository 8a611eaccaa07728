"""Integer LayerNorm. Oracle: torch's float LayerNorm on the same input."""

import torch
from torch.testing import assert_close

from qat import functional as F
from tests.tiny import randn

IN_SCALE = 0.01 * torch.tensor([1.0, 2.0, 8.0, 4.0, 1.0, 1.0, 2.0, 4.0])
WEIGHT = torch.tensor([1.0, -0.5, 2.0, 0.7, 1.2, 0.0, 0.9, 1.1])
BIAS = torch.linspace(-1, 1, 8)


def inputs(*shape):
    x = randn(*shape, 8)
    return (x / IN_SCALE).round() * IN_SCALE


def test_close_to_float():
    x, step = inputs(5, 7), torch.tensor([0.02])
    out = F.integer_layer_norm(x, IN_SCALE, step, WEIGHT, BIAS)
    exact = torch.nn.functional.layer_norm(x, (8,), WEIGHT, BIAS, 1e-12)
    # Half a step of the output, and 2^-7 of the multiplier times the largest product.
    assert_close(out, exact, rtol=0, atol=0.01 + 2**-7 * (exact - BIAS).abs().max().item() + 0.01)
    assert_close((out / step).round() * step, out)
    assert (out - exact).abs().max() > 1e-3


def test_a_constant_row_gives_the_bias():
    # In the reference 0/0.
    x = torch.full((1, 8), 0.4)
    out = F.integer_layer_norm(x, torch.full((8,), 0.1), torch.tensor([0.25]), WEIGHT, BIAS)
    assert_close(out[0], (BIAS / 0.25).round() * 0.25)
