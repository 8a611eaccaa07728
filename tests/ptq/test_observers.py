"""Ranges of several batches and processes. Oracle: formulas of FQ-ViT written out here, and the range of all data at once."""

import pytest
import torch
from torch.testing import assert_close

from qat.functional.observers import RangeState
from qat.ptq.observers import Observer, reaching_zero
from qat.quantizers import build_quantizer
from qat.spec import QuantSpec

GENERATOR = torch.Generator()


def observer(method, axis=None, shape=(4, 5, 6), bits=8, signed=False):
    quantizer = build_quantizer(QuantSpec("input", "affine", bits, signed=signed, axis=axis, observer=method, map_scales="column"))
    quantizer.allocate(torch.Size(shape), torch.device("cpu"))
    return Observer(quantizer)


def batches(n=3):
    return [torch.randn(4, 5, 6, generator=GENERATOR.manual_seed(i)) * (i + 1) for i in range(n)]


@pytest.mark.parametrize("axis", [None, -1, -2])
@pytest.mark.parametrize("method", ["minmax", "ema", "percentile", "omse", "mse"])
def test_nothing_is_known_at_first_and_shapes_stay(method, axis):
    made = observer(method, axis)
    shapes = {name: b.shape for name, b in made.named_buffers()}
    assert made.low.isnan().all()
    assert made.high.isnan().all()
    for batch in batches():
        made.update(batch)
    assert {name: b.shape for name, b in made.named_buffers()} == shapes
    assert made.seen == 3
    assert all(t.isfinite().all() for t in (*made.buffers(), *made.scale(batches()[-1])))


def test_outermost_ends():
    made = observer("minmax", axis=-1)
    for batch in batches():
        made.update(batch)
    everything = torch.cat(batches()).flatten(0, 1)
    assert torch.equal(made.low, everything.amin(0))
    assert torch.equal(made.high, everything.amax(0))


def test_moving_average_of_ends():
    made = observer("ema")
    expected = None
    for batch in batches():
        made.update(batch)
        expected = batch.max() if expected is None else expected + 0.01 * (batch.max() - expected)
    assert_close(made.high, expected.reshape(1))


@pytest.mark.parametrize("method", ["minmax", "omse"])
def test_processes_join_to_the_range_of_all_batches(method):
    alone, parts = observer(method, -1), [observer(method, -1) for _ in range(2)]
    for i, batch in enumerate(batches()):
        alone.update(batch)
        parts[i % 2].update(batch)
    joined = parts[0]
    joined._take(torch.stack([torch.stack([p.low, p.high, p.seen.expand_as(p.low)]) for p in parts]))
    assert torch.equal(joined.low, alone.low)
    assert torch.equal(joined.high, alone.high)
    assert joined.seen == 3


def test_processes_join_to_the_mean_of_moving_averages():
    parts = [observer("ema"), observer("ema"), observer("ema")]  # the third one gets no batch
    for _ in range(3):
        parts[0].update(torch.tensor([-1.0, 1.0]))
    parts[1].update(torch.tensor([-3.0, 5.0]))
    parts[0]._take(torch.stack([torch.stack([p.low, p.high, p.seen.expand_as(p.low)]) for p in parts]))
    assert_close(parts[0].low, torch.tensor([-1.5]))
    assert_close(parts[0].high, torch.tensor([2.0]))


def test_a_quantizer_that_no_process_saw_has_no_range():
    unseen = observer("minmax")
    unseen._take(torch.zeros(2, 3, 1))
    assert unseen.seen == 0


def test_deviates_from_reference_a_range_far_from_zero_reaches_it():
    # The reference clips the zero point to a code, and what is worth 5.0 to 6.0 would all become 1.0.
    made = observer("minmax")
    x = torch.linspace(5, 6, 120).view(4, 5, 6)
    made.update(x)
    scale, zero_point = made.scale(x)
    assert ((x / scale + zero_point).round().clamp(0, 255) - zero_point).mul(scale).sub(x).abs().max() <= scale / 2 + 1e-6
    low, high = reaching_zero(RangeState(torch.tensor([0.01, 5.0, -6.0, -1.0]), torch.tensor([1.0, 6.0, -5.0, 1.0])))
    assert low.tolist() == pytest.approx([0.01, 0.0, -6.0, -1.0])  # next to zero the reference's formula stays
    assert high.tolist() == pytest.approx([1.0, 6.0, 0.0, 1.0])
