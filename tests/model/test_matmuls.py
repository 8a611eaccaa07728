"""Matrix products of a model. Oracle: multiply-accumulates counted by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from qat.model.products import MatrixProduct, matmuls


class Every(nn.Module):
    """A product of each kind: (B, 3, 4)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.weight = nn.Parameter(torch.ones(4, 2))
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        t = x.transpose(1, 2)
        x @ t
        torch.bmm(x, t)
        x.matmul(t)
        torch.einsum("bnc,bmc->bnm", x, x)
        torch.einsum("...nc,...mc->...nm", x, x)
        torch.einsum(x, [0, 1, 2], x, [0, 3, 2])
        torch.mm(x[0], t[0])
        torch.addmm(x[0, :, :3], x[0], t[0])
        torch.baddbmm(x[..., :3], x, t)
        self.attention(x[0], x[0], x[0])
        F.scaled_dot_product_attention(x, x, x)
        x @ self.weight
        return self.layer(x)


def test_every_kind():
    square = [MatrixProduct("0", 3 * 3 * 4, True)] * 9
    by_weights = [MatrixProduct("0", 3 * 4 * 2, False), MatrixProduct("0.layer", 3 * 4 * 5, False)]
    projections = [MatrixProduct("0.attention", 3 * 4 * 4, False)] * 4
    attention = [*projections, *[MatrixProduct("0.attention", 3 * 3 * 4, True)] * 2]
    everything = [*square, *attention, *square[:2], *by_weights]
    assert matmuls(nn.Sequential(Every()), (3, 4)) == everything


def test_convolutions_count_their_own_channels():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1))
    assert matmuls(net, (4, 5, 5)) == [MatrixProduct("0", 8 * 25 * 2 * 9, False)]
