"""Query-key reparameterization. Oracle: an explicit loop over heads, and the scores it has to reproduce."""

import pytest
from torch.testing import assert_close

import qat
from qat import functional as F
from tests.tiny import randn

HEADS, HEAD_DIM, WIDTH = 3, 4, 10


@pytest.fixture
def wq():
    return randn(HEADS * HEAD_DIM, WIDTH, seed=0)


@pytest.fixture
def wk():
    return randn(HEADS * HEAD_DIM, WIDTH, seed=1)


def head(w, h):
    return w[h * HEAD_DIM : (h + 1) * HEAD_DIM]


def test_scores_through_the_fold(wq, wk):
    x, y = randn(5, WIDTH, seed=2), randn(7, WIDTH, seed=3)
    folded = F.fold_qk(wq, wk, HEADS).unflatten(0, (HEADS, WIDTH))
    for h in range(HEADS):
        assert_close(
            x @ folded[h] @ y.T, (x @ head(wq, h).T) @ (y @ head(wk, h).T).T, rtol=1e-5, atol=1e-5
        )


def test_fold_q_bias_is_the_score_of_the_bias(wq, wk):
    bias, x, y = randn(HEADS * HEAD_DIM, seed=4), randn(5, WIDTH, seed=2), randn(7, WIDTH, seed=3)
    per_key = y @ F.fold_q_bias(wk, bias, HEADS).T
    folded = F.fold_qk(wq, wk, HEADS).unflatten(0, (HEADS, WIDTH))
    for h in range(HEADS):
        q, k = x @ head(wq, h).T + head(bias, h), y @ head(wk, h).T
        assert_close(x @ folded[h] @ y.T + per_key[:, h], q @ k.T, rtol=1e-5, atol=1e-5)


def test_rows_have_to_divide_into_heads(wq, wk):
    with pytest.raises(
        qat.UsageError, match=r"num_heads=5: wq \(12, 10\) and wk \(12, 10\) must agree and divide"
    ):
        F.fold_qk(wq, wk, 5)
    with pytest.raises(qat.UsageError, match=r"wk \(9, 10\)"):
        F.fold_qk(wq, wk[:9], 3)
