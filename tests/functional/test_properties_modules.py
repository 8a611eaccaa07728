"""What holds for every quantizer module once it is calibrated. Oracle: the property itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import functional as F
from tests.functional.test_properties import values
from tests.quantizers.common import allocated, calibrated

EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)
KINDS = ("lsq", "minmax", "minmax_dynamic", "statsq", "affine")
STORED = ("lsq", "minmax", "affine")  # scales do not follow the input
kinds = pytest.mark.parametrize("kind", KINDS)
tensors = st.builds(values, st.sampled_from([(4, 6), (3, 4, 5)]), st.integers(0, 2**31))


def made(kind, x, bits=4, axis=-1):
    """A quantizer with scales from `x`; `affine`, which is filled from outside, gets those of its own range."""
    role = "weight" if kind in {"statsq", "minmax_dynamic"} else "input"
    axis = 0 if role == "weight" else axis
    if kind != "affine":
        return calibrated(kind, x, role, bits, axis=axis)
    quantizer = allocated(kind, x, role, bits, axis=axis, signed=False)
    scale, zero = F.affine_scale(x, bits, False, quantizer.axis)
    quantizer.scale.copy_(scale)
    quantizer.zero_point.copy_(zero)
    return quantizer


@kinds
@given(x=tensors, bits=st.integers(2, 8))
@EXAMPLES
def test_codes_and_values_of_any_input(kind, x, bits):
    """Calibrated on it, zeros, one value everywhere and denormals too: 2^bits codes at most, and finite values of the same shape."""
    quantizer = made(kind, x, bits)
    codes, out = quantizer.codes(x), quantizer(x)
    assert out.shape == codes.shape == x.shape
    assert out.dtype == x.dtype
    assert out.isfinite().all()
    assert not codes.is_floating_point()
    assert int(codes.max()) - int(codes.min()) < 2**bits
    if kind in STORED:
        assert torch.equal(quantizer(out), out)
        assert quantizer(x[:0]).shape == quantizer.codes(x[:0]).shape == x[:0].shape
