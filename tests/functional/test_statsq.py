"""StatsQ. Oracle: its closed form, levels s * (k + 1/2) / 2^(b-1) with s = 2 * mean|w| per output row."""

import pytest
import torch
from hypothesis import strategies as st
from torch.testing import assert_close

import qat
from qat import functional as F
from tests.tiny import randn

BITS = [2, 3, 4, 8]


def drawn(rows, columns, seed, magnitude):
    return randn(rows, columns, seed=seed) * magnitude


weights = st.builds(
    drawn,
    st.integers(1, 5),
    st.integers(1, 33),
    st.integers(0, 2**31),
    st.sampled_from([1e-20, 1e-6, 1.0, 1e6]),
)


def test_two_bits_by_hand():
    # mean |w| = 1, so s = 2: thresholds at -1, 0, 1 and levels -1.5, -0.5, 0.5, 1.5.
    w = torch.tensor([[-2.2, -0.3, 0.4, 1.1]])
    assert_close(F.statsq(w, 2), torch.tensor([[-1.5, -0.5, 0.5, 1.5]]))
    assert F.statsq_codes(w, 2).tolist() == [[-2, -1, 0, 1]]
    assert_close(F.statsq_scale(w), torch.tensor([[2.0]]))


@pytest.mark.parametrize("bits", BITS)
def test_every_value_is_the_level_nearest_to_it(bits):
    w = randn(3, 50)
    n = 2 ** (bits - 1)
    levels = (F.statsq_scale(w).unsqueeze(-1) * (torch.arange(-n, n) + 0.5) / n).expand(
        3, 50, 2 * n
    )
    nearest = (w.unsqueeze(-1) - levels).abs().argmin(-1, keepdim=True)
    assert_close(F.statsq(w, bits), levels.gather(-1, nearest).squeeze(-1))


def test_zero_on_a_threshold_goes_up():
    w = torch.tensor([[0.0, 1.0, -1.0]])
    assert F.statsq_codes(w, 2)[0, 0] == 0
    assert_close(F.statsq(w, 2)[0, 0], F.statsq_scale(w)[0, 0] / 4)


def test_three_dimensions_take_one_mean_after_the_other():
    # As the paper's code. Equal weights lie on a tie, so that the last digit of the scale decides where all of them go.
    assert torch.equal(F.statsq(torch.full((2, 1, 4), 0.7), 2), torch.full((2, 1, 4), 0.35))
    w = randn(5, 3, 7)
    assert torch.equal(F.statsq_scale(w), 2 * w.abs().mean(-1, keepdim=True).mean(0, keepdim=True))


def test_backward_keeps_nothing():
    kept = []
    w = randn(4, 30).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.statsq(w, 2)
    assert kept == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_low_precision_input_is_quantized_in_float32(bits, dtype):
    w = randn(8, 64).to(dtype)
    w[0, 0] = 30.0  # the top clip would round to 1 in bfloat16 and leave the grid
    out = F.statsq(w, bits)
    assert out.dtype == dtype
    assert torch.equal(out, F.statsq(w.float(), bits).to(dtype))
    assert F.statsq_codes(w, bits).max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("function", [F.statsq, F.statsq_codes])
@pytest.mark.parametrize("bits", [1, 9, 2.5, True])
def test_bits_that_cannot_be_represented(function, bits):
    with pytest.raises(qat.UsageError, match=rf"bits={bits}: must be an integer from 2 to 8"):
        function(randn(2, 2), bits)
