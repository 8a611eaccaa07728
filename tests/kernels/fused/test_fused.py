"""Fused Functions. Oracle: the same by Functions of one quantizer each, which autograd puts together; forward bit for bit."""

import sys

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from qat.kernels import CodeRange, LSQParams, Made
from qat.kernels.fused import (
    QkrOperands,
    QkrWeights,
    Scoring,
    WeightParams,
    attention,
    heads,
    lsq_linear,
    qkr_attention,
    remember,
)
from qat.kernels.fused import weight as of_weight
from tests import tiny
from tests.kernels.fused import simple
from tests.tiny import kept_bytes

B, N, H, D = 4, 7, 2, 6
C = H * D


def randn(*shape, seed=0, scale=1.0):
    return (scale * tiny.randn(*shape, seed=seed)).requires_grad_()


def operand(n, grid, offsets=2, seed=0, channels=C):
    scale = (0.2 + torch.rand(n, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    before, after = (
        randn(channels, seed=seed + i, scale=0.2) if i <= offsets else None for i in (1, 2)
    )
    return LSQParams(scale, before, after, None, grid, 0.5)


def leaves(*parts):
    out = []
    for part in parts:
        if isinstance(part, torch.Tensor) and part.requires_grad:
            out.append(part)
        elif isinstance(part, tuple):
            out += leaves(*part)
    return out


def compare(fused, plain, tensors):
    """Equal results; gradients of a random projection alike."""
    upstream = randn(fused.shape, seed=9).to(fused.dtype)
    assert torch.equal(fused, plain)
    found, expected = (
        torch.autograd.grad(out, tensors, upstream, retain_graph=True) for out in (fused, plain)
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)


def learned(rows, axis=0, *, half=False):
    """LSQ of a weight, at 2 bits."""
    step = (
        0.3 + torch.rand(rows if axis == 0 else 1, generator=torch.Generator().manual_seed(70))
    ).requires_grad_()
    return WeightParams((CodeRange(-2, 1, axis, half=half), 1.0), step)


STATSQ = WeightParams(2)
WEIGHTS = {
    "statsq": STATSQ,
    "lsq": learned(9),
    "half steps": learned(9, half=True),
    "a step a tensor": learned(9, None),
    "quantized already": WeightParams(None),
}


def linear_parts(bias=True, offsets=2, params=STATSQ):
    x, w = randn(B, N, C, seed=20, scale=2.0), randn(9, C, seed=21)
    return (
        x,
        operand(N, CodeRange(-2, 1, -2), offsets),
        w,
        params,
        randn(9, seed=22) if bias else None,
    )


@pytest.mark.parametrize("params", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(("bias", "offsets"), [(True, 2), (False, 2), (True, 0), (False, 1)])
def test_linear(params, bias, offsets):
    parts = linear_parts(bias, offsets, params)
    compare(lsq_linear(*parts), simple.lsq_linear(*parts), leaves(*parts))


@pytest.mark.parametrize("params", [STATSQ, WEIGHTS["lsq"]], ids=["statsq", "lsq"])
def test_a_weight_that_is_kept_is_not_quantized_again(params):
    parts = linear_parts(params=params)
    ready = simple.quantize_weight(params, parts[2]).detach()
    kept = (*parts[:3], params._replace(cached=ready), parts[4])
    compare(lsq_linear(*kept), lsq_linear(*parts), leaves(*parts))


@pytest.mark.parametrize(
    "params", [STATSQ, WEIGHTS["lsq"], WeightParams(None)], ids=["statsq", "lsq", "none"]
)
def test_backward_with_the_quantized_weight_at_hand_gives_the_same_bits(params, monkeypatch):
    found = []
    for kept in (set(), {"cpu"}):
        monkeypatch.setattr(of_weight, "SAVED_ON", kept)
        parts = linear_parts(params=params)
        found.append(torch.autograd.grad(lsq_linear(*parts).square().sum(), leaves(*parts)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "how", [Made("norm", 1e-5), Made("none"), Made("tanh")], ids=["norm", "gelu", "gelu of tanh"]
)
def test_what_can_be_made_again_is_not_kept(how):
    x, o, w, params, b = linear_parts()
    gamma, beta = randn(C, seed=30), randn(C, seed=31)
    inputs = (x, gamma, beta) if how.kind == "norm" else (x,)

    def run(note):
        made = (
            F.layer_norm(x, (C,), gamma, beta)
            if how.kind == "norm"
            else F.gelu(x, approximate=how.kind)
        )
        return lsq_linear(remember(made, how, *inputs) if note else made, o, w, params, b)

    parameters = leaves(o, w, b, gamma, beta)
    bytes_with, with_note = kept_bytes(lambda: run(note=True), parameters)
    bytes_without, without = kept_bytes(lambda: run(note=False), parameters)
    assert bytes_without - bytes_with == x.numel() * 4
    tensors = leaves(inputs, o, w, b)
    assert torch.equal(with_note, without)
    for one, other in zip(
        *(torch.autograd.grad(out.square().sum(), tensors) for out in (with_note, without)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_tensor_written_into_is_kept_itself():
    x, o, w, params, b = linear_parts()
    made = remember(F.gelu(x), Made("none"), x)
    made.mul_(2)
    compare(
        lsq_linear(made, o, w, params, b),
        simple.lsq_linear(2 * F.gelu(x), o, w, params, b),
        leaves(x, o, w, b),
    )


def test_an_input_written_into_is_an_error():
    """As it is where the Linear is float: neither LayerNorm nor GELU can be made again."""
    x, o, w, params, b = linear_parts()
    x = x * 1
    made = remember(F.gelu(x), Made("none"), x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lsq_linear(made, o, w, params, b).sum().backward()


def attention_parts(seed=40):
    qkv = randn(B, N, 3 * C, seed=seed)
    token, channel = CodeRange(-2, 1, -2), CodeRange(-2, 1, -1)
    operands = (
        operand(N, token, 2),
        operand(N, token, 1, 5),
        operand(C, channel, 2, 10),
        operand(N, CodeRange(0, 3, -2), 0, 15),
    )
    return qkv, tuple(
        o._replace(scale=(0.1 * o.scale).detach().requires_grad_()) if i == 3 else o
        for i, o in enumerate(operands)
    )


def extras(kind):
    bias = randn(H, N, N, seed=50) if kind != "none" else None
    mask = (
        -100.0 * (torch.rand(2, N, N, generator=torch.Generator().manual_seed(2)) > 0.8)
        if kind == "bias and mask"
        else None
    )
    return bias, mask


@pytest.fixture(params=[1, 8], ids=["rows as they are", "rows of eight"])
def rows(request, monkeypatch):
    """What rows of scores are a multiple of."""
    monkeypatch.setitem(heads.ROWS, "cpu", request.param)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["none", "bias", "bias and mask"])
@pytest.mark.parametrize("factor", [0.25, 0.3])
def test_attention(factor, kind, keep):
    qkv, operands = attention_parts()
    bias, mask = extras(kind)
    fused = attention(qkv, operands, Scoring(bias, mask, H, factor, keep))
    plain = simple.attention(qkv, operands, Scoring(bias, mask, H, factor, keep))
    compare(fused, plain, leaves(qkv, operands, bias))


def test_products_see_rows_of_eight(monkeypatch):
    seen = []
    monkeypatch.setitem(heads.ROWS, "cpu", 8)
    product = heads.heads_product
    for module in ("attention", "scores"):
        found = sys.modules[f"qat.kernels.fused.{module}"]
        monkeypatch.setattr(
            found,
            "heads_product",
            lambda a, b, out, f: seen.append((a.shape[-1], out.shape)) or product(a, b, out, f),
        )
    qkv, operands = attention_parts()
    attention(qkv, operands, Scoring(None, None, H, 0.3, keep_probs=False)).sum().backward()
    assert seen == [
        (D, (H, B, N, 8)),  # scores, twice; the gradient of the probabilities
        (8, (H, B, N, D)),  # what leaves the heads
        (D, (H, B, N, 8)),
        (D, (H, B, N, 8)),
        (N, (H, B, 8, D)),  # gradients of values, queries, keys
        (8, (H, B, N, D)),
        (N, (H, B, 8, D)),
    ]


TWO_WIDTHS = WeightParams(2), WeightParams(3)


def qkr_parts(per_key=False, params=TWO_WIDTHS):
    x = randn(B, N, C, seed=60)
    per_key = randn(H, C, seed=67) if per_key else None
    weights = QkrWeights(
        randn(H * C, C, seed=61, scale=2.0),
        randn(C, C, seed=63),
        randn(C, seed=64),
        randn(H * C, seed=65),
        per_key,
    )
    token = CodeRange(-2, 1, -2)
    probs = operand(N, CodeRange(0, 3, -2), 0, 15)
    operands = QkrOperands(
        operand(N, token, 2),
        operand(N * H, token, 0, 5)._replace(
            scale=randn(N * H, seed=66).abs().detach().add(1).requires_grad_()
        ),
        operand(C, CodeRange(-2, 1, -1), 2, 10),
        probs._replace(scale=(0.1 * probs.scale).detach().requires_grad_()),
    )
    return x, weights, params, operands


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["none", "bias and mask"])
@pytest.mark.parametrize("per_key", [True, False])
@pytest.mark.parametrize("factor", [0.125, 0.07])
def test_qkr(factor, per_key, kind, keep):
    parts = qkr_parts(per_key)
    scoring = Scoring(*extras(kind), H, factor, keep)
    compare(
        qkr_attention(*parts, scoring),
        simple.qkr_attention(*parts, scoring),
        leaves(*parts, scoring),
    )


@pytest.mark.parametrize("keep", [True, False])
def test_a_backward_pass_inside_autocast_whose_forward_pass_was_not(keep):
    parts, scoring = qkr_parts(per_key=True), Scoring(None, None, H, 0.07, keep)
    out, tensors = qkr_attention(*parts, scoring), leaves(*parts)
    expected = torch.autograd.grad(out, tensors, torch.ones_like(out), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, tensors, torch.ones_like(out))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0.1, atol=0.02 * other.abs().max().item())


@pytest.mark.parametrize("ready", [True, False])
def test_qkr_with_learned_steps_of_weights(ready):
    parts = qkr_parts(per_key=True, params=(learned(H * C), learned(C, half=True)))
    scoring = Scoring(None, None, H, 0.07, keep_probs=True)
    plain = simple.qkr_attention(*parts, scoring)
    x, weights, params, operands = parts
    if ready:
        made = (
            simple.quantize_weight(p, w).detach() for p, w in zip(params, weights[:2], strict=True)
        )
        params = tuple(p._replace(cached=w) for p, w in zip(params, made, strict=True))
    compare(qkr_attention(x, weights, params, operands, scoring), plain, leaves(*parts))
