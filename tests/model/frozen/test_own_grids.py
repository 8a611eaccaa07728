"""Grids that no quantizer of qat has: an offset behind the weight's rows, a zero point anywhere. Oracle: the net itself."""

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.quantizers import Quantizer, UniformGrid
from tests import tiny


class Centered(Quantizer):
    """q(w - mean) + mean, in every row."""

    def __init__(self, spec):
        super().__init__(spec)
        self.n = 2 ** (spec.bits - 1)

    def parts(self, w):
        inside = tuple(range(1, w.ndim))
        mean = w.mean(inside, keepdim=True)
        return mean, (w - mean).abs().amax(inside, keepdim=True) / self.n

    def codes(self, w):
        mean, step = self.parts(w)
        return ((w - mean) / step).round().clamp(-self.n, self.n - 1).to(torch.int8)

    def forward(self, w):
        mean, step = self.parts(w)
        return self.codes(w) * step + mean

    def grid(self, w=None):
        if w is None:
            return None
        mean, step = self.parts(w.detach())
        return UniformGrid(qmin=-self.n, qmax=self.n - 1, step=step.flatten(), axis=0, before=-mean, after=self.behind(mean, w))

    def behind(self, mean, w):
        return mean


class Slanted(Centered):
    def behind(self, mean, w):
        return mean + 0.1 * w


class AnyZero(Centered):
    def codes(self, w):
        return (w / self.scale(w) + 0.3).round().clamp(-self.n, self.n - 1).to(torch.int8)

    def scale(self, w):
        return w.abs().amax() / self.n

    def forward(self, w):
        return (self.codes(w) - 0.3) * self.scale(w)

    def grid(self, w=None):
        step = self.scale(w.detach()).reshape(1)
        return UniformGrid(qmin=-self.n, qmax=self.n - 1, step=step, zero_point=torch.full_like(step, 0.3))


def quantized(cls):
    net = tiny.vit()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05)
    qat.convert(net, qat.recipe("ofq_noqkr", bits=4, weight_quantizer=f"{__name__}:{cls.__name__}"), input_size=tiny.SIZE)
    return qat.initialize_scales(net, [tiny.images(8)]).eval()


def test_an_offset_behind_each_row(tmp_path):
    net, images = quantized(Centered), tiny.images(4, 1)
    with torch.no_grad():
        expected = net(images)
    assert torch.equal(qat.freeze(net)(images), expected)
    assert_close(qat.integer_forward(net, images), expected, rtol=1e-5, atol=1e-6)
    qat.save_pretrained(net, tmp_path)
    assert torch.equal(qat.from_pretrained(tmp_path, imports=[__name__])(images), expected)


def test_an_offset_that_differs_within_a_row_is_refused():
    with pytest.raises(qat.UsageError, match=r"freeze: .*weight_quantizer has an offset behind its quantizer that differs within a row"):
        qat.freeze(quantized(Slanted))


def test_a_zero_point_between_codes_is_no_integer():
    net, images = quantized(AnyZero), tiny.images(4, 1)
    with torch.no_grad():
        assert torch.equal(qat.freeze(net)(images), net(images))
    with pytest.raises(qat.UsageError, match=r"weight_quantizer: its zero point is no whole or half number of codes"):
        qat.integer_forward(net, images)
