"""Learnable offsets. Oracle: q(x + a) + c written out."""

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from qat.quantizers import LSQ
from tests.quantizers.common import allocated, calibrated
from tests.tiny import randn


def shifted(x, offsets="both", **spec):
    """Calibrated around nonzero offsets."""
    made = allocated("lsq", x, offsets=offsets, **spec)
    with torch.no_grad():
        for parameter in (made.offset_before, made.offset_after):
            if parameter is not None:
                parameter.copy_(randn(*parameter.shape, seed=7))
    made.calibrate(x, {})
    return made


def test_offsets_start_at_zero():
    x = randn(2, 3, 4)
    made = calibrated("lsq", x, axis=-2, offsets="both")
    assert made.offset_before.abs().sum() == made.offset_after.abs().sum() == 0
    assert torch.equal(made(x), calibrated("lsq", x, axis=-2)(x))


def test_offsets_that_older_files_store_as_a_map_are_loaded():
    x = randn(2, 3, 4)
    made = shifted(x, map_scales="tensor", offset_ndim=2)
    assert made.before.shape == made.after.shape == (3, 4)
    state = made.state_dict()
    maps = {name: state[name].view(3, 4) for name in ("offset_before", "offset_after")}
    other = shifted(-x, map_scales="tensor", offset_ndim=2)
    other.load_state_dict({**state, **maps})
    assert torch.equal(other(x), made(x))
    assert other.offset_before.shape == (12,)


def test_codes_of_a_net_in_half_precision_are_those_of_its_forward():
    x = randn(2, 50, 40).bfloat16()
    made = shifted(randn(2, 50, 40), "both", axis=-2).bfloat16()
    moved, scale = x.float() + made.offset_before.float(), made.quantizer.scale.float()
    assert torch.equal(made.codes(x), F.lsq_codes(moved, scale, -8, 7, -2))
    given = made(x).float() - made.offset_after.float()
    assert_close((given / scale[:, None]).round(), made.codes(x).float(), rtol=0, atol=0.5)


def test_gradients_of_the_offsets():
    x = randn(2, 3, 4)
    made = shifted(x, axis=-2, bits=2)
    upstream = randn(2, 3, 4, seed=1)
    made(x).backward(upstream)
    u = (x + made.offset_before).detach() / made.quantizer.scale.detach().view(3, 1)
    inside = (u >= -2) & (u <= 1)
    assert not inside.all()
    assert_close(made.offset_before.grad, (upstream * inside).sum((0, 1)))
    assert_close(made.offset_after.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("quantizer", ["lsq", "seq"])
def test_unsigned_codes_may_start_at_the_lowest_input(quantizer, signed):
    """Of the outputs of a GELU for low inputs: unsigned codes alone would round all to 0."""
    x = torch.nn.functional.gelu(randn(2, 3, 40) - 1)
    errors = []
    for offset_init in ("zero", "minimum"):
        made = calibrated(
            quantizer,
            x,
            axis=-2,
            bits=4,
            signed=signed,
            offsets="both",
            offset_init=offset_init,
            step_init="mse",
        )
        errors.append((made(x) - x).square().mean() / x.square().mean())
        lowest = x.min() if offset_init == "minimum" and not signed else torch.zeros(())
        assert torch.equal(made.offset_after, lowest.expand(40))
        assert torch.equal(made.offset_before, -made.offset_after)
    assert (errors[1] < 0.3 * errors[0]) is not signed


def test_only_the_first_batch_sets_offsets_whatever_the_quantizer_stores(monkeypatch):
    monkeypatch.setattr(LSQ, "calibrate", lambda self, x, state: None)
    spec = {"axis": -2, "bits": 4, "signed": False, "offset_init": "minimum"}
    made = allocated("lsq", torch.zeros(3, 4), **spec, offsets="both")
    state = {}
    for minimum in (-1.0, -5.0):
        made.calibrate(torch.full((3, 4), minimum), state)
    assert torch.equal(made.offset_before, torch.ones(4))
