"""Frozen and packed floats of 8 bits. Oracles: the net they were made of, bit for bit; torch's E4M3 type."""

import pytest
import torch

import qat
from tests import tiny


def test_codes_are_bytes_of_e4m3():
    net = tiny.quantized("fp8")
    frozen = qat.freeze(net).blocks[0].mlp.fc1.weight_quantizer
    numbers = frozen.codes().view(torch.float8_e4m3fn).float() * frozen.scale[:, None]
    assert torch.equal(numbers, net.blocks[0].mlp.fc1.quantized_weight("weight"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_net_of_another_dtype(dtype):
    frozen = qat.freeze(tiny.quantized("fp8"))
    expected = tiny.logits(frozen)
    found = tiny.logits(frozen.to(dtype), tiny.images().to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.15 * expected.abs().max()
