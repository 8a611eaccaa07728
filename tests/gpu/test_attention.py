"""Attention whose scores are never in memory. Oracle: the Function that keeps probabilities; in half precision, float32 on the same values.

Random values are no ties: probabilities differ by 1e-6 of themselves, and so close to a threshold is none of these.
"""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from qat.kernels import CodeRange, LSQParams, attention
from qat.kernels.fused import Scoring
from qat.kernels.fused import attention as whole
from tests.tiny import identical

NAMES = ("attention_forward", "attention_backward")
SIZES = [(1, 1, 16), (7, 3, 24), (37, 1, 64), (37, 3, 20), (197, 3, 16), (256, 1, 8)]


def parts(tokens, heads, size, axis=-2, scale=None, batch=2):
    """Queries, keys and values beside each other, and the quantizers; leaves of a graph."""
    torch.manual_seed(0)
    width, steps = heads * size, 1 if axis is None else tokens
    qkv = torch.randn(batch, tokens, 3 * width, requires_grad=True)
    signed = CodeRange(-2, 1, -2)
    q, k, v = (
        LSQParams((0.5 + torch.rand(tokens)).requires_grad_(), None, None, None, signed, 0.5)
        for _ in range(3)
    )
    before, after = (torch.randn(width).requires_grad_() for _ in range(2))
    step = (0.5 + torch.rand(steps)) / tokens if scale is None else torch.full((steps,), scale)
    probs = LSQParams(step.requires_grad_(), None, None, None, CodeRange(0, 3, axis))
    return qkv, (q, k, v._replace(before=before, after=after), probs)


def results(qkv, operands, heads, monkeypatch, *, in_tiles):
    monkeypatch.setattr(attention, "fits", lambda *_: in_tiles)
    out = whole(qkv, operands, Scoring(None, None, heads, 0.3, True))
    leaves = [t for t in (qkv, *(t for o in operands for t in o[:3])) if t is not None]
    torch.manual_seed(1)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape))


def both_ways(*given):
    return (results(*given, in_tiles=in_tiles) for in_tiles in (True, False))


CASES = [(size, {}) for size in SIZES] + [
    ((37, 2, 16), {"axis": None}),
    ((37, 2, 16), {"scale": 3.0}),
    ((37, 2, 16), {"scale": 1e-7}),
    ((37, 2, 16), {"scale": -1.0, "axis": None}),
]


@pytest.mark.parametrize(("size", "how"), CASES)
def test_results_and_gradients_of_the_function_that_keeps_probabilities(
    kernels_on, monkeypatch, size, how
):
    with torch.device(kernels_on):
        found, expected = both_ways(*parts(*size, **how), size[1], monkeypatch)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_a_query_that_is_no_number_spoils_its_row(kernels_on, monkeypatch):
    with torch.device(kernels_on):
        qkv, operands = parts(20, 2, 16)
        qkv.data[0, 3, 5] = torch.nan
        found, expected = both_ways(qkv, operands, 2, monkeypatch)
    rows = found[0].isnan()
    assert rows[0, 3, :16].all()
    assert rows.sum() == 16
    assert all(
        torch.equal(one.isnan(), other.isnan()) for one, other in zip(found, expected, strict=True)
    )


def tensors(dtype, tokens=37, heads=3, size=24):
    torch.manual_seed(2)
    qkvg = torch.randn(2, tokens, 4 * heads * size).to(dtype).chunk(4, -1)
    return (*qkvg, torch.rand(tokens) / tokens, (0, 3, -2, False, heads, 0.2))


def both(q, k, v, grad, scale, settings):
    out, sums = attention.forward(q, k, v, scale, *settings)
    return out, *attention.backward(grad, sums, q, k, v, scale, *settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_factors_and_results(kernels_on, dtype):
    with torch.device(kernels_on):
        *given, scale, settings = tensors(dtype)
        found = both(*given, scale, settings)
        exact = both(*(x.float() for x in given), scale, settings)
    *halves, of_scale = found
    assert {x.dtype for x in halves} == {dtype}
    assert_close(of_scale, exact[-1], rtol=1e-4, atol=1e-5 * float(exact[-1].abs().max()))
    for one, other in zip(halves, exact[:-1], strict=True):
        # Half a unit for the factor, and half for the result.
        assert (one.float() - other).norm() <= torch.finfo(dtype).eps * other.norm()


def test_rows_may_lie_apart(kernels_on):
    with torch.device(kernels_on):
        *given, scale, settings = tensors(torch.float32)
        apart = both(*given, scale, settings)
        close = both(*(x.contiguous() for x in given), scale, settings)
    assert identical(apart, close)


@pytest.mark.parametrize("axis", [-2, None])
def test_operators_are_what_torch_wants_them_to_be(kernels_on, axis):
    with torch.device(kernels_on):
        q, k, v, grad, scale, settings = tensors(torch.float32, tokens=5)
        given = (q, k, v, scale if axis else scale[:1], *settings[:2], axis, *settings[3:])
        torch.library.opcheck(torch.ops.qat.attention_forward.default, given)
        torch.library.opcheck(
            torch.ops.qat.attention_backward.default, (grad, torch.zeros(2, 3, 5), *given)
        )


def test_a_compiled_graph_holds_the_operators(kernels_on, monkeypatch):
    graphs = []

    def keep(graph, _):
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.device(kernels_on):
        given = parts(9, 2, 16)
        eager = results(*given, 2, monkeypatch, in_tiles=True)
        run = torch.compile(
            whole, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
        )
        monkeypatch.setitem(globals(), "whole", run)
        traced = results(*given, 2, monkeypatch, in_tiles=True)
    assert {f"qat.{name}.default" for name in NAMES} <= set(graphs)
    assert not any("softmax" in name or "heads_product" in name for name in graphs)
    assert identical(eager, traced)


PER_TOKEN = CodeRange(0, 3, -2)


@pytest.mark.parametrize(
    ("expected", "tokens", "size", "batch", "codes", "dtype"),
    [
        (True, 197, 64, 2, PER_TOKEN, torch.bfloat16),
        (True, 197, 64, 2, PER_TOKEN, torch.float32),
        (True, 256, 128, 2, PER_TOKEN, torch.float16),
        (True, 1, 64, 2, CodeRange(0, 3, None), torch.float32),
        (False, 257, 64, 2, PER_TOKEN, torch.bfloat16),
        (False, 197, 136, 2, PER_TOKEN, torch.bfloat16),
        (False, 197, 128, 2, PER_TOKEN, torch.float32),
        (False, 197, 20, 2, PER_TOKEN, torch.bfloat16),
        (False, 197, 24, 2, PER_TOKEN, torch.bfloat16),
        (False, 197, 64, 2**16, PER_TOKEN, torch.bfloat16),
        (False, 197, 64, 0, PER_TOKEN, torch.bfloat16),
        (False, 197, 64, 2, CodeRange(0, 3, -1), torch.bfloat16),
        (False, 197, 64, 2, CodeRange(-2, 1, -2), torch.bfloat16),
        (False, 197, 64, 2, CodeRange(0, 3, -2, half=True), torch.bfloat16),
    ],
)
def test_what_fits(monkeypatch, expected, tokens, size, batch, codes, dtype):
    monkeypatch.setattr(attention, "_runs_on", lambda *_: True)
    qkv, heads = torch.empty(batch, tokens, 3 * 3 * size, device="meta"), 3
    scale = torch.ones(1 if codes.axis is None else tokens)
    assert attention.fits(qkv, heads, scale, codes, dtype) is expected
    assert not attention.fits(qkv, heads, torch.ones(300), codes, dtype)


def test_only_a_device_has_such_kernels(anywhere):
    with anywhere:
        fits = attention.fits(torch.empty(2, 5, 96), 2, torch.ones(5), PER_TOKEN, torch.bfloat16)
    assert fits is (anywhere.type == "cuda")
