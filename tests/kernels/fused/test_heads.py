import pytest
import torch

from qat.kernels.fused import heads


@pytest.mark.parametrize("tokens", [5, 90])
@pytest.mark.parametrize("factor", [1.0, 0.25, 0.3])
@pytest.mark.parametrize("shared", [False, True])
def test_products_written_between_those_of_other_heads(tokens, factor, shared):
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, tokens, tokens), heads.view_by_head(torch.randn(2, tokens, 3 * 64), 3)
    a = a[0] if shared else a
    out = torch.full((2, tokens, 3 * 64), torch.nan)
    heads.heads_product(a, b, heads.view_by_head(out, 3), factor)
    expected = (a.double() @ b.double() * factor).permute(1, 2, 0, 3).flatten(-2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_small_and_large_products_are_the_same_bits(monkeypatch):
    torch.manual_seed(0)
    a, b = (
        torch.randn(3, 4, 16, 16).transpose(-2, -1),
        heads.view_by_head(torch.randn(4, 16, 3 * 32), 3),
    )
    found = []
    for large in (0, 2048):
        monkeypatch.setattr(heads, "MIN_IN_PLACE", large)
        out = torch.empty(4, 16, 3 * 32)
        heads.heads_product(a, b, heads.view_by_head(out, 3), 0.125)
        found.append(out)
    assert torch.equal(*found)


def test_a_sum_over_heads_in_half_precision_is_rounded_once():
    torch.manual_seed(0)
    a, rows = torch.randn(12, 2, 5, 7).bfloat16(), torch.randn(2, 7 * 12, 4).bfloat16()
    b = rows.unflatten(1, (-1, 12)).permute(2, 0, 1, 3)
    start = torch.randn(2, 5, 4).bfloat16()
    found, exact = start.clone(), start + (a.double() @ b.double()).sum(0)
    heads.add_products(a, b, found)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
