"""StatsQ with a range by root mean square. Oracle: the formula written out, and the best error on normal values by numeric search."""

import pytest
import torch
from torch.testing import assert_close

from qat.functional.statsq import GAUSSIAN_RANGE, statsq_rms_scale
from tests.quantizers.common import allocated
from tests.tiny import randn


@pytest.mark.parametrize("bits", sorted(GAUSSIAN_RANGE))
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 5), (4, 3, 2, 2)])
def test_levels_reach_to_c_times_the_root_mean_square(bits, shape):
    w = 10 * randn(*shape)
    made = allocated("statsq_rms", w, bits=bits, axis=0, role="weight")
    dims = (0, 2) if len(shape) == 3 else tuple(range(1, len(shape)))
    rms = w.double().square().mean(dims, keepdim=True).sqrt()
    top = GAUSSIAN_RANGE[bits] * rms
    step = 2 * top / (2**bits - 1)
    codes = (w.double() / step).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(made.codes(w).double(), codes)
    assert_close(made(w), ((codes + 0.5) * step).float())
    assert_close(made.grid(w).dequantize(made.codes(w)), made(w))


def test_deviates_from_reference_the_gradient_passes_within_the_range_alone():
    w = torch.tensor([[0.1, -0.1, 0.1, -5.0]]).requires_grad_()
    made = allocated("statsq_rms", w, bits=2, axis=0, role="weight")
    made(w).sum().backward()
    scale = statsq_rms_scale(w, 2).item()
    assert w.grad.tolist() == [[1.0, 1.0, 1.0, float(scale >= 5)]]


@pytest.mark.parametrize("bits", sorted(GAUSSIAN_RANGE))
def test_no_other_range_is_better_for_normal_values(bits):
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)

    def error(top):
        step = 2 * top / (2**bits - 1)
        value = ((x / step).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5) * step
        return ((x - value) ** 2 * density).sum()

    best = GAUSSIAN_RANGE[bits]
    assert error(best) <= 1.0001 * min(error(best * factor) for factor in (0.98, 0.99, 1.01, 1.02))
