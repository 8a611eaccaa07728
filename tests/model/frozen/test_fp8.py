"""Frozen and packed floats of 8 bits. Oracles: the net they were made of, bit for bit; torch's E4M3 type."""

import pytest
import torch

import qat
from qat.model.cost import size_bytes
from tests import tiny
from tests.model.frozen.test_packed import written
from tests.nets import FAMILIES
from tests.quantizers.test_fp8 import KNOBS


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", KNOBS)
def test_files_give_the_logits_of_the_net(name, tmp_path):
    net = tiny.quantized("fp8", **KNOBS[name])
    expected, frozen = tiny.logits(net), qat.freeze(net)
    assert torch.equal(tiny.logits(frozen), expected)
    sizes = written(frozen, tmp_path / "net.safetensors")
    assert sum(sizes.values()) == (tmp_path / "net.safetensors").stat().st_size
    assert abs(size_bytes(frozen) - size_bytes(net)) < 0.02 * size_bytes(net)
    for file, saved in (("trained.pt", net), ("frozen.pt", frozen)):
        qat.save(saved, tmp_path / file)
    for file in ("net.safetensors", "trained.pt", "frozen.pt"):
        assert torch.equal(tiny.logits(qat.load(tmp_path / file)), expected)


@pytest.mark.parametrize("family", ["swin", "pvt_v2"])
def test_other_families(family):
    family = FAMILIES[family]
    x = family.images(4)
    net = qat.initialize_scales(family.converted("fp8"), [x])
    assert torch.equal(tiny.logits(qat.freeze(net), x), tiny.logits(net, x))


def test_codes_are_bytes_of_e4m3():
    net = tiny.quantized("fp8")
    frozen = qat.freeze(net).blocks[0].mlp.fc1.weight_quantizer
    numbers = frozen.codes().view(torch.float8_e4m3fn).float() * frozen.scale[:, None]
    assert torch.equal(numbers, net.blocks[0].mlp.fc1.quantized("weight"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_net_of_another_dtype(dtype):
    frozen = qat.freeze(tiny.quantized("fp8"))
    expected = tiny.logits(frozen)
    found = tiny.logits(frozen.to(dtype), tiny.images().to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.15 * expected.abs().max()
