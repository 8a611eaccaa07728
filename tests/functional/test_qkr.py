"""Query-key reparameterization. Oracle: an explicit loop over heads, and the scores it has to reproduce."""

import pytest
from torch.testing import assert_close

from qat import functional as F
from tests.errors import usage_error
from tests.tiny import randn

HEADS, HEAD_DIM, WIDTH = 3, 4, 10
WQ, WK = (randn(HEADS * HEAD_DIM, WIDTH, seed=seed) for seed in (0, 1))


def head(w, h):
    return w[h * HEAD_DIM : (h + 1) * HEAD_DIM]


def test_scores_through_the_fold_and_its_bias():
    bias, x, y = randn(HEADS * HEAD_DIM, seed=4), randn(5, WIDTH, seed=2), randn(7, WIDTH, seed=3)
    per_key = y @ F.fold_q_bias(WK, bias, HEADS).T
    folded = F.fold_qk(WQ, WK, HEADS).unflatten(0, (HEADS, WIDTH))
    for h in range(HEADS):
        q, k = x @ head(WQ, h).T + head(bias, h), y @ head(WK, h).T
        assert_close(x @ folded[h] @ y.T + per_key[:, h], q @ k.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "rows"), [(5, 12), (3, 9)])
def test_rows_have_to_divide_into_heads(heads, rows):
    with usage_error(rf"^num_heads={heads}: wq is \(12, 10\) and wk \({rows}, 10\)"):
        F.fold_qk(WQ, WK[:rows], heads)
