"""Powers of two. Oracle: the definition 2^-round(-log2 x)."""

import torch

from tests.quantizers.common import build


def test_codes_are_exponents():
    made = build("log2", role="probs", bits=3, signed=False)
    x = torch.tensor([1.0, 0.5, 0.26, 0.1, 2.0**-7, 2.0**-9, 0.0])
    assert made.codes(x).tolist() == [0, 1, 2, 3, 7, 7, 7]
    assert made(x).tolist() == [1.0, 0.5, 0.25, 0.125, 2.0**-7, 0.0, 0.0]
    assert made.n_scales == 0
    assert not made.state_dict()


def test_deviates_from_reference_an_exact_zero_stays_zero():
    # There log2(0) leads to inf - inf.
    made = build("log2", role="probs", bits=4, signed=False)
    assert made(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert made.codes(torch.zeros(3)).tolist() == [15, 15, 15]
