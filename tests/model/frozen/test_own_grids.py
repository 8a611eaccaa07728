"""Grids that no quantizer of qat has: an offset behind the weight's rows, a zero point anywhere. Oracle: the net itself."""

import pytest
import torch

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
        return UniformGrid(
            qmin=-self.n,
            qmax=self.n - 1,
            step=step.flatten(),
            axis=0,
            before=-mean,
            after=self.behind(mean, w),
        )

    def behind(self, mean, w):
        return mean


def quantized(cls):
    net = tiny.vit()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05)
    name = f"{__name__}:{cls.__name__}"
    return tiny.fitted(net, tiny.images(), "ofq_noqkr", bits=4, weight_quantizer=name)


def test_an_offset_behind_each_row(tmp_path):
    net, images = quantized(Centered), tiny.images(4, 1)
    with torch.no_grad():
        expected = net(images)
    assert torch.equal(qat.freeze(net)(images), expected)
    qat.save_pretrained(net, tmp_path)
    assert torch.equal(qat.from_pretrained(tmp_path, imports=[__name__])(images), expected)


@pytest.mark.long
def test_an_offset_behind_each_row_in_onnx(tmp_path):
    assert (
        qat.export_onnx(
            quantized(Centered), tmp_path / "net.onnx", images=tiny.images(4, 1)
        ).problem
        is None
    )
