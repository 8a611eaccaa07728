"""The band of annealing. Oracles: the definition written out threshold by threshold, shares given by the paper's code, hand-made rows."""

import numpy as np
import pytest
import torch

from qat import functional as F
from qat.quantizers import UniformGrid
from tests.tiny import randn


def by_definition(z, boundary):
    """Near = within the boundary of i + 1/2, for i from the lowest code to below the highest; z as float32."""
    z = z.numpy()
    codes = np.rint(z)
    near = np.zeros(z.shape, dtype=bool)
    for i in range(int(codes.min()), int(codes.max())):
        above = z - np.float32(i)
        near |= (above >= np.float32(0.5 - boundary)) & (above <= np.float32(0.5 + boundary))
    return torch.from_numpy(near)


@pytest.mark.parametrize("shape", [(12, 500), (6, 10, 40), (8, 10, 6, 6)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_definition(shape, bits):
    w, n = randn(*shape), 2 ** (bits - 1)
    z = (w / F.statsq_scale(w)).clamp(-1, 1 - 1e-6) * n - 0.5
    for boundary in (0.003, 0.05, 0.3):
        near = F.near_threshold(w, bits, boundary)
        assert near.dtype == torch.bool
        assert torch.equal(near, by_definition(z, boundary))


@pytest.mark.parametrize(
    ("boundary", "percent"),
    [(0.003, (0.48, 0.51, 0.52)), (0.005, (0.79, 0.86, 0.86)), (0.01, (1.55, 1.69, 1.74))],
)
def test_shares_of_gaussian_rows(boundary, percent):
    w = randn(1000, 1000)
    for bits, expected in zip((2, 3, 4), percent, strict=True):
        assert 100 * F.near_threshold(w, bits, boundary).float().mean().item() == pytest.approx(
            expected, abs=0.03
        )


def test_only_thresholds_between_codes_that_occur():
    # All codes are 0 or 1: what is near zero or beyond is not near the threshold between them.
    w = torch.tensor([[1e-4, 0.5, 0.99, 0.51]])
    assert F.statsq_codes(w, 2).tolist() == [[0, 0, 1, 1]]
    assert not F.near_threshold(w, 2, 0.01)[0, 0]
    assert F.near_threshold(torch.cat([w, -w]), 2, 0.01)[0, 0]


@pytest.mark.parametrize("axis", [0, None])
def test_the_band_of_a_stored_step(axis):
    w = randn(8, 300)
    scale = torch.rand(8 if axis == 0 else 1, generator=torch.Generator().manual_seed(1)) + 0.3
    z = (w / (scale[:, None] if axis == 0 else scale)).clamp(-4, 3)
    found = UniformGrid(qmin=-4, qmax=3, step=scale, axis=axis).near_threshold(w, 0.02)
    assert torch.equal(found, by_definition(z, 0.02))
