"""Query-key reparameterization in a net. Oracle: the formula written out."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from qat import functional as QF
from tests.nn.shown import attend
from tests.tiny import quantized


@pytest.mark.parametrize("qk_bias", ["drop", "fold"])
def test_deviates_from_reference_product_offset_is_a_bias(qk_bias):
    # There it is a module of its own around the quantizer.
    attn = quantized("ofq", bits=2, qk_bias=qk_bias).blocks[0].attn
    with torch.no_grad():
        attn.product_offset.normal_()
    x = torch.randn(3, 17, 32)
    xq = attn.input_quantizer(x)
    folded = QF.statsq(QF.fold_qk(attn.q_weight, attn.k_weight, 2), 2).unflatten(0, (2, 32))
    scale = attn.k_quantizer.scale.view(17, 2)
    scores = []
    for h in range(2):
        y = xq @ folded[h].T + attn.product_offset.view(2, 32)[h]
        score = xq @ QF.lsq(y, scale[:, h], -2, 1, 1).transpose(1, 2)
        if qk_bias == "fold":
            k = attn.k_weight.unflatten(0, (2, 16))[h]
            score = score + (xq @ k.T @ attn.q_bias.view(2, 16)[h]).unsqueeze(1)
        scores.append(score / 4)
    v = F.linear(xq, QF.statsq(attn.v.weight, 2), attn.v.bias)
    assert_close(attn(x), attend(attn, torch.stack(scores, 1), v))
