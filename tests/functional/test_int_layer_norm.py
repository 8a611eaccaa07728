"""Integer LayerNorm. Oracle: torch's float LayerNorm on the same input."""

import torch
from torch.testing import assert_close

from qat import functional as F

WEIGHT = torch.tensor([1.0, -0.5, 2.0, 0.7, 1.2, 0.0, 0.9, 1.1])
BIAS = torch.linspace(-1, 1, 8)


def test_a_constant_row_gives_the_bias():
    # In the reference 0/0.
    x = torch.full((1, 8), 0.4)
    out = F.integer_layer_norm(x, torch.full((8,), 0.1), torch.tensor([0.25]), WEIGHT, BIAS)
    assert_close(out[0], (BIAS / 0.25).round() * 0.25)
