"""Fused Functions. Oracle: the same by Functions of one quantizer each, which autograd puts together; forward bit for bit."""

import sys

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from qat.kernels import CodeRange, LSQParams, Producer
from qat.kernels.fused import (
    QkrQuantizers,
    QkrWeights,
    Scoring,
    WeightParams,
    attach_source,
    attention,
    heads,
    lsq_linear,
    qkr_attention,
)
from qat.kernels.fused import weight as of_weight
from tests import tiny
from tests.kernels.fused import simple
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
    grid = CodeRange(-2, 1, axis, half=half)
    return WeightParams((grid, 1.0), operand(rows if axis == 0 else 1, grid, seed=70).scale)


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
    return x, operand(N, TOKEN, offsets), w, params, randn(9, seed=22) if bias else None


@pytest.mark.parametrize("params", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(("bias", "offsets"), [(True, 2), (False, 2), (True, 0), (False, 1)])
def test_linear(params, bias, offsets):
    parts = linear_parts(bias, offsets, params)
    compare(lsq_linear(*parts), simple.lsq_linear(*parts), leaves(*parts))


@pytest.mark.parametrize("name", ["lsq", "half steps", "a step a tensor"])
def test_steps_of_a_frozen_weight_learn(name):
    x, o, w, params, b = linear_parts(params=WEIGHTS[name])
    parts = x, o, w.detach(), params, b
    compare(lsq_linear(*parts), simple.lsq_linear(*parts), leaves(*parts))
    x, weights, params, operands = qkr_parts(params=(learned(H * C), learned(C)))
    weights = weights._replace(matrix=weights.matrix.detach(), v=weights.v.detach())
    parts, scoring = (x, weights, params, operands), Scoring(None, None, H, 0.07, save_probs=True)
    compare(qkr_attention(*parts, scoring), simple.qkr_attention(*parts, scoring), leaves(*parts))


@pytest.mark.parametrize(
    "params", [STATSQ, WEIGHTS["lsq"], WeightParams(None)], ids=["statsq", "lsq", "none"]
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
    [Producer("norm", 1e-5), Producer("none"), Producer("tanh")],
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
            made = F.gelu(x, approximate=how.kind)
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
    made = attach_source(F.gelu(x), Producer("none"), x)
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
    made = attach_source(F.gelu(x), Producer("none"), x)
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


def extras(kind):
    """A bias and a mask of the scores, or None."""
    bias = None if kind == "none" else randn(H, N, N, seed=50)
    hidden = torch.rand(2, N, N, generator=torch.Generator().manual_seed(2)) > 0.8
    return bias, -100.0 * hidden if kind == "bias and mask" else None


@pytest.fixture(params=[1, 8], ids=["rows as they are", "rows of eight"])
def rows(request, monkeypatch):
    """What rows of scores are a multiple of."""
    monkeypatch.setitem(heads.ROW_MULTIPLES, "cpu", request.param)


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


TWO_WIDTHS = WeightParams(2), WeightParams(3)


def qkr_parts(per_key=False, params=TWO_WIDTHS):
    weights = QkrWeights(
        randn(H * C, C, seed=61, scale=2.0),
        randn(C, C, seed=63),
        randn(C, seed=64),
        randn(H * C, seed=65),
        randn(H, C, seed=67) if per_key else None,
    )
    operands = QkrQuantizers(
        operand(N, TOKEN, 2),
        operand(N * H, TOKEN, 0, 5, 3.0),
        operand(C, CHANNEL, 2, 10),
        operand(N, PROBS, 0, 15, 0.1),
    )
    return randn(B, N, C, seed=60), weights, params, operands


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
    scoring = Scoring(None, None, H, 0.07, save_probs=True)
    plain = simple.qkr_attention(*parts, scoring)
    x, weights, params, operands = parts
    if ready:
        params = tuple(
            p._replace(cached=simple.quantize_weight(p, w).detach())
            for p, w in zip(params, weights[:2], strict=True)
        )
    compare(qkr_attention(x, weights, params, operands, scoring), plain, leaves(*parts))
