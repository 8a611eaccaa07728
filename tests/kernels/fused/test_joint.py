"""Scores of all heads in one product. Oracle: a product for each head, and autograd."""

import pytest
import torch

from qat.kernels.fused import joint_scores

B, N, H, C = 2, 5, 3, 4


def by_head(x, keys, num_heads):
    return x.unsqueeze(1) @ keys.unflatten(1, (-1, num_heads)).permute(0, 2, 3, 1)


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = (B, N, C), (B, N * H, C), (B, H, N, N)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_products_and_gradients():
    x, keys, weights = inputs()
    found, expected = joint_scores(x, keys, H), by_head(x, keys, H)
    assert found.shape == (B, H, N, N)
    assert found.stride(-1) == 1
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad((scores * weights).sum(), [x, keys]) for scores in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_its_dtype_and_gradients_the_inputs(dtype):
    x, keys, _ = (t.detach().float().requires_grad_() for t in inputs())
    with torch.autocast("cpu", dtype):
        found, expected = joint_scores(x, keys, H), by_head(x, keys, H)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    found.float().square().sum().backward()
    assert x.grad.dtype == keys.grad.dtype == torch.float32
