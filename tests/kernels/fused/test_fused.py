"""What fused Functions save, refuse and multiply. Oracle: the same Function when it saves everything; results are in tests/nn/test_fused_nets.py."""

import sys

import pytest
import torch
from torch.nn import functional as F

from qat.kernels import CodeRange, LSQParams, Producer
from qat.kernels.fused import (
    Scoring,
    WeightParams,
    attach_source,
    attention,
    heads,
    lsq_linear,
)
from qat.kernels.fused import weight as of_weight
from tests import tiny
from tests.tiny import identical, kept_bytes

B, N, H, D = 4, 7, 2, 6
C = H * D
TOKEN = CodeRange(-2, 1, -2)
CHANNEL = CodeRange(-2, 1, -1)
PROBS = CodeRange(0, 3, -2)


def randn(*shape, seed=0, scale=1.0):
    return (scale * tiny.randn(*shape, seed=seed)).requires_grad_()


def operand(n, grid, offsets=2, seed=0, size=1.0):
    """A quantizer with `n` steps around `size`; one offset is the one before it."""
    generator = torch.Generator().manual_seed(seed)
    scale = (size * (0.2 + torch.rand(n, generator=generator))).requires_grad_()
    before = randn(C, seed=seed + 1, scale=0.2) if offsets else None
    after = randn(C, seed=seed + 2, scale=0.2) if offsets == 2 else None
    return LSQParams(scale, before, after, None, grid, 0.5)


def leaves(*parts):
    out = []
    for part in parts:
        if isinstance(part, torch.Tensor) and part.requires_grad:
            out.append(part)
        elif isinstance(part, tuple):
            out += leaves(*part)
    return out


def linear_parts(params=None):
    x, w = randn(B, N, C, seed=20, scale=2.0), randn(9, C, seed=21)
    return x, operand(N, TOKEN), w, params or WeightParams(2), randn(9, seed=22)


@pytest.mark.parametrize(
    "params",
    [
        WeightParams(2),
        WeightParams((CHANNEL, 1.0), operand(C, CHANNEL).scale),
        WeightParams(None),
    ],
    ids=["statsq", "lsq", "none"],
)
def test_backward_with_the_quantized_weight_at_hand_gives_the_same_bits(params, monkeypatch):
    found = []
    for kept in (set(), {"cpu"}):
        monkeypatch.setattr(of_weight, "SAVED_ON", kept)
        parts = linear_parts(params=params)
        found.append(torch.autograd.grad(lsq_linear(*parts).square().sum(), leaves(*parts)))
    assert identical(*found)


@pytest.mark.parametrize(
    "how",
    [Producer("norm", 1e-5), Producer("gelu"), Producer("gelu_tanh")],
    ids=["norm", "gelu", "gelu of tanh"],
)
def test_what_can_be_made_again_is_not_kept(how):
    x, o, w, params, b = linear_parts()
    gamma, beta = randn(C, seed=30), randn(C, seed=31)
    inputs = (x, gamma, beta) if how.kind == "norm" else (x,)

    def run(note):
        if how.kind == "norm":
            made = F.layer_norm(x, (C,), gamma, beta)
        else:
            made = F.gelu(x, approximate="none" if how.kind == "gelu" else "tanh")
        return lsq_linear(attach_source(made, how, *inputs) if note else made, o, w, params, b)

    parameters = leaves(o, w, b, gamma, beta)
    bytes_with, with_note = kept_bytes(lambda: run(note=True), parameters)
    bytes_without, without = kept_bytes(lambda: run(note=False), parameters)
    assert bytes_without - bytes_with == x.numel() * 4
    tensors = leaves(inputs, o, w, b)
    assert torch.equal(with_note, without)
    grads = (torch.autograd.grad(out.square().sum(), tensors) for out in (with_note, without))
    assert identical(*grads)


def test_a_tensor_written_into_is_kept_itself():
    x, o, w, params, b = linear_parts()
    made = attach_source(F.gelu(x), Producer("gelu"), x)
    made.mul_(2)
    found, expected = (lsq_linear(y, o, w, params, b) for y in (made, 2 * F.gelu(x)))
    assert torch.equal(found, expected)
    tensors = leaves(x, o, w, b)
    grads = (torch.autograd.grad(out.square().sum(), tensors) for out in (found, expected))
    assert identical(*grads)


def test_an_input_written_into_is_an_error():
    """As it is where the Linear is float: neither LayerNorm nor GELU can be made again."""
    x, o, w, params, b = linear_parts()
    x = x * 1
    made = attach_source(F.gelu(x), Producer("gelu"), x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lsq_linear(made, o, w, params, b).sum().backward()


def attention_parts():
    operands = (
        operand(N, TOKEN, 2),
        operand(N, TOKEN, 1, 5),
        operand(C, CHANNEL, 2, 10),
        operand(N, PROBS, 0, 15, 0.1),
    )
    return randn(B, N, 3 * C, seed=40), operands


def test_products_see_rows_of_eight(monkeypatch):
    seen = []
    monkeypatch.setitem(heads.ROW_MULTIPLES, "cpu", 8)
    product = heads.heads_product
    for module in ("attention", "scores"):
        found = sys.modules[f"qat.kernels.fused.{module}"]
        monkeypatch.setattr(
            found,
            "heads_product",
            lambda a, b, out, f: seen.append((a.shape[-1], out.shape)) or product(a, b, out, f),
        )
    qkv, operands = attention_parts()
    attention(qkv, operands, Scoring(None, None, H, 0.3, save_probs=False)).sum().backward()
    assert seen == [
        (D, (H, B, N, 8)),  # scores, twice; the gradient of the probabilities
        (8, (H, B, N, D)),  # what leaves the heads
        (D, (H, B, N, 8)),
        (D, (H, B, N, 8)),
        (N, (H, B, 8, D)),  # gradients of values, queries, keys
        (8, (H, B, N, D)),
        (N, (H, B, 8, D)),
    ]
