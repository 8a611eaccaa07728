"""StatsQ beyond the golden cases: memory, dtypes, bits. Oracle: its closed form, float32."""

import pytest
import torch

from qat import functional as F
from tests.errors import usage_error
from tests.tiny import kept_bytes, randn

BITS = [2, 3, 4, 8]


def test_three_dimensions_take_one_mean_after_the_other():
    # As the paper's code. Equal weights lie on a tie, so that the last digit of the scale decides where all of them go.
    assert torch.equal(F.statsq(torch.full((2, 1, 4), 0.7), 2), torch.full((2, 1, 4), 0.35))
    w = randn(5, 3, 7)
    assert torch.equal(F.statsq_scale(w), 2 * w.abs().mean(-1, keepdim=True).mean(0, keepdim=True))


def test_backward_keeps_nothing():
    w = randn(4, 30).requires_grad_()
    kept, _ = kept_bytes(lambda: F.statsq(w, 2), [])
    assert kept == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_deviates_from_reference_bfloat16_stays_on_the_grid(bits, dtype):
    # There 1 - 1e-6 rounds to 1 in bfloat16, and the top code becomes n.
    w = randn(8, 64).to(dtype)
    w[0, 0] = 30.0  # the top clip would round to 1 in bfloat16 and leave the grid
    out = F.statsq(w, bits)
    assert out.dtype == dtype
    assert torch.equal(out, F.statsq(w.float(), bits).to(dtype))
    assert F.statsq_codes(w, bits).max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("function", [F.statsq, F.statsq_codes])
@pytest.mark.parametrize("bits", [1, 9, 2.5, True])
def test_bits_that_cannot_be_represented(function, bits):
    with usage_error(rf"^bits={bits}: "):
        function(randn(2, 2), bits)
