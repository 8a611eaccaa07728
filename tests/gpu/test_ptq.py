"""Post-training quantization on a device. Oracle: the same on a CPU, and the float net's logits on other images."""

import pytest
import torch

from qat.ptq.compensate import compensate
from qat.ptq.reconstruct import ReconstructSettings, reconstruct
from tests import tiny
from tests.ptq.fitting import error, pair

IMAGES, OTHERS = tiny.images(48), tiny.images(64, 9)
# Of the CPU's error: float products of a device round otherwise, and what lies between two codes goes to the one or the other.
LIKE = 0.1


def moved(device, **knobs):
    """Calibrated and float net, there."""
    net, reference = pair(**knobs)
    return net.to(device), reference.to(device)


@pytest.mark.long
def test_compensation_is_that_of_the_cpu(anywhere):
    errors = []
    for device in (torch.device("cpu"), anywhere):
        net, reference = moved(device)
        compensate(net, reference, [IMAGES])
        errors.append(error(net, reference, OTHERS.to(device)))
    assert errors[1] == pytest.approx(errors[0], rel=LIKE)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_reconstruction_comes_closer_as_on_the_cpu(anywhere, dtype):
    settings = ReconstructSettings(steps=40, batch=16, lr=2e-3, scale_lr=1e-2)
    net, reference = moved(anywhere, method="reconstruct")
    before = error(net, reference, OTHERS.to(anywhere))
    reconstruct(
        net,
        reference,
        IMAGES,
        settings,
        context=lambda: torch.autocast(anywhere.type, dtype, enabled=dtype is not None),
    )
    assert error(net, reference, OTHERS.to(anywhere)) < 0.8 * before
    assert all(p.device.type == anywhere.type for p in net.parameters())
