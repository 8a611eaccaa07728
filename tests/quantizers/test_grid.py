"""Grids of quantizers. Oracle: the codes and values that the quantizers compute."""

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.quantizers import LSQ, Quantizer, UniformGrid
from qat.spec import QuantSpec
from tests import tiny
from tests.analysis.common import KINDS, net_of
from tests.quantizers.common import build


@pytest.mark.sample(6)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_codes_and_values_are_those_of_the_quantizer(kind):
    net = net_of(kind)
    seen = {n: pair for n, pair in tiny.watched(net).items() if not net.get_submodule(n).is_float}
    assert len(seen) >= 10
    for name, (x, values) in seen.items():
        quantizer = net.get_submodule(name)
        grid, codes = quantizer.grid(x), quantizer.codes(x).float()
        assert torch.equal(
            grid.to_code_coordinates(x).round().clamp(grid.qmin, grid.qmax), codes
        ), name
        assert not grid.step.requires_grad, name
        if not quantizer.spec.bias_correction:
            assert_close(grid.dequantize(codes), values, rtol=1e-6, atol=1e-6)
            after = 0 if grid.after is None else grid.after
            lowest, highest = (end + after for end in grid.ends(x.ndim))
            assert ((values >= lowest - 1e-6) & (values <= highest + 1e-6)).all(), name


def test_powers_of_two():
    quantizer = build("log2", "probs", bits=2, signed=False)
    grid, x = quantizer.grid(), torch.tensor([1.0, 0.4, 0.2, 0.1])
    assert (grid.qmin, grid.qmax, grid.unit) == (0, 3, 0.125)
    assert (
        grid.dequantize(quantizer.codes(x)).tolist()
        == quantizer(x).tolist()
        == [1.0, 0.5, 0.25, 0.125]
    )
    assert grid.to_code_coordinates(x).round().tolist() == [0, 1, 2, 3]
    assert [end.item() for end in grid.ends()] == [0.125, 1.0]


def test_a_grid_that_follows_the_tensor_is_not_known_without_it():
    for quantizer in (
        build("statsq", "weight", axis=0),
        build("statsq", "input", axis=-1),
        build("minmax_dynamic", "weight", axis=0),
    ):
        assert quantizer.grid() is None
        assert isinstance(quantizer.grid(torch.randn(3, 4)), UniformGrid)
    assert build("float", "input", bits=32).grid(torch.randn(3, 4)) is None


class Odd(Quantizer):
    """A quantizer that says nothing of its grid: signs."""

    def forward(self, x):
        return x.sign()

    def codes(self, x):
        return x.sign().to(torch.int8)


class Doubled(LSQ):
    """Rounds in a way of its own and says nothing of it."""

    def forward(self, x):
        return 2 * super().forward(x)


class Noise:
    """A mixin."""

    def forward(self, x):
        return super().forward(x) + 0.01


class Noisy(Noise, LSQ):
    """Rounds in a way that is not its own."""


class Renamed(LSQ):
    """Rounds as LSQ does."""


def test_who_rounds_in_another_way_inherits_neither_grid_nor_operand():
    spec = QuantSpec("input", "lsq", 2, axis=None)
    found = {}
    for cls in (Odd, Doubled, Noisy, Renamed):
        quantizer = cls(spec)
        quantizer.allocate(torch.Size([2, 3, 4]), torch.device("cpu"))
        found[cls] = quantizer.grid(torch.ones(3)), quantizer.fused_params()
    assert found[Odd] == found[Doubled] == found[Noisy] == (None, None)
    grid, operand = found[Renamed]
    assert (grid.qmax, operand.codes) == (1, (-2, 1, None, False))


def test_zeros_on_a_step_of_zero_sit_on_the_threshold():
    weight = torch.randn(4, 8)
    weight[2] = 0
    grid = build("statsq", "weight", axis=0, bits=2).grid(weight)
    assert (grid.to_code_coordinates(weight)[2] == -0.5).all()
    assert (grid.dequantize(torch.zeros_like(weight))[2] == 0).all()
    assert torch.equal(
        grid.near_threshold(weight, 0.005), qat.functional.near_threshold(weight, 2, 0.005)
    )
