"""Min-max quantizers. Oracle: the range of the data, written out."""

import pytest
import torch
from torch.testing import assert_close

from qat import functional as F
from tests.quantizers.common import allocated, build
from tests.tiny import randn


@pytest.mark.parametrize("axis", [-1, 1, None])
def test_several_batches_join_their_ranges(axis):
    batches = [randn(4, 5, 6, seed=s) * (s + 1) for s in (0, 2, 1)]
    made, state = allocated("minmax", batches[0], axis=axis), {}
    for batch in batches:
        made.calibrate(batch, state)
    scale, zero_point = F.affine_scale(torch.cat(batches), 4, False, axis)
    assert torch.equal(made.scale, scale)
    assert torch.equal(made.zero_point, zero_point)


def test_weights_follow_their_own_range():
    made = build("minmax_dynamic", role="weight", axis=0)
    for w in (randn(4, 6), 10 * randn(4, 6, seed=1)):
        scale = w.abs().amax(1) / 7.5
        codes = (w / scale.view(-1, 1)).round().clamp(-8, 7)
        assert_close(made(w), codes * scale.view(-1, 1))
        assert torch.equal(made.codes(w), codes.to(torch.int8))
