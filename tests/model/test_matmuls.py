"""Which matrix products run. Oracle: multiply-accumulates counted by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from qat.model.matmuls import MatrixProduct, watching


class Every(nn.Module):
    """A product of each kind: (B, 3, 4)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.weight = nn.Parameter(torch.ones(4, 2))

    def forward(self, x):
        t = x.transpose(1, 2)
        x @ t
        torch.bmm(x, t)
        x.matmul(t)
        torch.baddbmm(torch.zeros(3, 3), x, t)
        torch.einsum("bnc,bmc->bnm", x, x)
        F.scaled_dot_product_attention(x, x, x)
        x @ self.weight
        return self.layer(x)


def test_every_kind():
    net = nn.Sequential(Every())
    with watching(net) as found:
        net(torch.randn(2, 3, 4))
    square = [MatrixProduct("0", 2 * 3 * 3 * 4, True)] * 7
    assert found == [*square, MatrixProduct("0", 2 * 3 * 4 * 2, False), MatrixProduct("0.layer", 2 * 3 * 4 * 5, False)]


def test_convolutions_count_their_own_channels():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1))
    with watching(net) as found:
        net(torch.randn(1, 4, 5, 5))
    assert found == [MatrixProduct("0", 8 * 25 * 2 * 9, False)]
