"""Packed codes. Oracle: explicit bits, and unpacking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.functional.packing import (
    pack_codes,
    pack_pairs,
    packed_bytes,
    unpack_codes,
    unpack_pairs,
)


def test_the_first_element_is_lowest():
    # 3 bits each: 001, 010, 011, 111 (-1) make the stream 100 010 11 | 0 111 0000, lowest bit first.
    assert pack_codes(torch.tensor([1, 2, 3, -1]), 3).tolist() == [0b11_010_001, 0b0000_111_0]
    assert pack_codes(torch.tensor([-2, -1, 0, 1]), 2).tolist() == [0b01_00_11_10]
    assert pack_codes(torch.tensor([5, -8, 7]), 4).tolist() == [0x85, 0x07]
    assert pack_codes(torch.tensor([-128, 127]), 8).tolist() == [0x80, 0x7F]


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(2, 8), n=st.integers(0, 40), signed=st.booleans(), seed=st.integers(0, 99))
def test_codes_come_back(bits, n, signed, seed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, (n, 3), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(3 * n, bits) == -(-3 * n * bits // 8)
    again = unpack_codes(packed, bits, codes.shape, signed=signed)
    assert again.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(again.long(), codes)


@pytest.mark.parametrize("n", [1, 6, 7])
def test_pairs_of_codes(n):
    codes = torch.arange(3 * n, dtype=torch.uint8).view(3, n) % 16
    packed = pack_pairs(codes)
    assert packed.shape == (3, (n + 1) // 2)
    assert packed[0, 0] == codes[0, 0] + 16 * (codes[0, 1] if n > 1 else 0)
    assert torch.equal(unpack_pairs(packed, n), codes)


@pytest.mark.parametrize(("codes", "low", "high"), [([0, 4], 0, 4), ([0, -3], -3, 0)])
def test_codes_that_do_not_fit_are_refused(codes, low, high):
    with pytest.raises(ValueError, match=f"{low} to {high} do not fit 2 bits"):
        pack_codes(torch.tensor(codes), 2)


def test_a_stream_of_another_length_is_refused():
    with pytest.raises(ValueError, match="expected 2"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, (4,), signed=True)
