"""Cases of Triton's kernels: each gives the names of the results that differ from the reference.

They run on torch's default device: a GPU, or the CPU with TRITON_INTERPRET=1, which Triton reads when it is imported. Inputs lie anywhere,
halfway between codes, on the ends of the range, one float beside them, and far outside.
"""

from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qat.functional.lsq import step_and_slope, step_of
from qat.functional.statsq import statsq_scale
from qat.functional.ste import sum_along
from qat.kernels import CodeRange, Made, gpu, library, operators, reference
from tests.kernels import calls

SCORES = Made("scores", 0.3)
BOUNDS = {"signed": (-2, 1), "unsigned": (0, 3), "three bits": (-4, 3), "four bits": (0, 15), "eight bits": (-128, 127),
          "half steps": (-2, 1, True), "half steps of three bits": (-4, 3, True)}  # fmt: skip
# Shape, axis, and the number of dimensions that offsets vary over.
FORMS = {
    "tokens": ((3, 5, 24), 1, 1),
    "tokens, no offsets": ((2, 5, 7), -2, 0),
    "channels": ((3, 5, 24), -1, 1),
    "channels, no offsets": ((9, 130), 1, 0),
    "one step": ((4, 3, 10), None, 0),
    "one step, offsets": ((4, 10), None, 1),
    "pixels": ((2, 3, 4, 5), 1, 2),
    "weights": ((6, 2, 3, 3), 0, 0),
    "heads": ((2, 3, 5, 5), -2, 0),
    "a row wider than a tile": ((2, 3, 1100), 1, 1),
    "many short rows": ((2, 700, 5), 1, 1),
    "one element": ((1, 1, 1), 1, 1),
    **{f"length {length}": ((2, 3, length), 1, 1) for length in (1, 7, 127, 129, 1000, 4097)},
    **{f"length {length} by column": ((3, length), -1, 1) for length in (1, 7, 127, 129, 1025)},
}


def same(a, b):
    """The same bits, every NaN alike; the second rounded to the dtype of the first."""
    a, b = (
        torch.where(x.isnan(), 7e7, x).view(torch.int32) for x in (a.float(), b.to(a.dtype).float())
    )
    return torch.equal(a, b)


def near(ours, expected, magnitude):
    """Within 1e-6 of the magnitudes that were added up."""
    return ours.shape == expected.shape and bool(
        ((ours - expected).abs() <= 1e-6 * magnitude).all()
    )


def values(step, shape, low, high, half=False):
    step = step.expand(shape)
    ends = torch.where(torch.rand(shape) < 0.5, step * low, step * high)
    halfway = step * (torch.randint(low - 1, high + 2, shape) + (0.0 if half else 0.5))
    away = torch.rand(shape) - 0.5
    beside = torch.where(ends == 0, away * step * 1e-30, torch.nextafter(ends, ends + away))
    kinds = [step * torch.randn(shape) * (high - low), halfway, ends, beside, step * 1e30]
    return torch.stack(kinds).gather(0, torch.randint(len(kinds), (1, *shape)))[0]


def case(shape, axis, n_offsets, bounds):
    """Input, scale, offsets before and after, grid. Steps are powers of two, so that halfway is exact, others, and one too small."""
    low, high, *half = bounds
    grid = CodeRange(low, high, axis, bool(half))
    scale = torch.tensor([0.5, 1e-7, 0.3, 2.0]).repeat(1 if axis is None else -(-shape[axis] // 4))[
        : 1 if axis is None else shape[axis]
    ]
    x = values(step_of(scale, len(shape), axis), shape, *bounds)
    before, after = (
        torch.randn(shape[-n_offsets:]).round() if n_offsets else None for _ in range(2)
    )
    return x, scale, before, after, grid


def differences(x, scale, before, after, grid, sign=None, grad=None, out=None, dtype=torch.float32):
    """Names of the results of both passes that differ; what they give is in `dtype`."""
    grad = torch.randn(x.shape) if grad is None else grad
    shape = None if after is None else after.shape
    expected, sizes = (
        reference.lsq_backward(g, x, scale, before, grid, sign=sign, after_shape=shape)
        for g in (grad, grad.abs())
    )
    furthest = 2 * max(-grid.qmin, grid.qmax) * sum_along(grad.float().abs(), grid.axis)
    expected_y = reference.lsq_forward(x, scale, before, after, grid, sign=sign)
    is_right = {
        "forward": same(
            calls.gpu_forward(x, scale, before, after, grid, sign=sign, dtype=dtype), expected_y
        )
    }
    found = calls.gpu_backward(
        grad, x, scale, before, grid, sign=sign, dequantized=dtype, after=after, out=out
    )
    is_right["dtype"] = (
        found.dequantized.dtype == dtype and found.x.dtype == (x if out is None else out).dtype
    )
    is_right["levels"] = same(found.dequantized, expected_y)
    is_right["out"] = out is None or found.x is out
    is_right["x"] = same(found.x, expected.x)
    is_right["scale"] = near(found.scale, expected.scale, furthest)
    for name in ("before", "after"):
        a, b, size = (getattr(each, name) for each in (found, expected, sizes))
        is_right[name] = a is None if b is None else near(a, b, size)
    return [name for name, right in is_right.items() if not right]


def without_a_number(shape, axis, n_offsets, bounds):
    x, scale, before, after, grid = case(shape, axis, n_offsets, bounds)
    scale[-1], x[0, 0] = torch.nan, torch.nan
    found = calls.gpu_forward(x, scale, before, after, grid)
    return (
        []
        if same(found, reference.lsq_forward(x, scale, before, after, grid)) and found.isnan().any()
        else ["forward"]
    )


def probs(shape, axis, dtype=torch.float32, hidden=0):
    x, scale, _, _, grid = case(shape, axis, 0, (0, 3))
    scores, grad = x.abs().clamp(max=9).to(dtype), torch.randn(shape)
    if hidden:
        scores[..., -hidden:] = -torch.inf
    p = scores.softmax(-1, dtype=torch.float32)
    expected, of_scale = calls.softmax_reference(grad, p, scale, grid, 0.3)
    size, furthest = grad.abs() * p, 6 * sum_along(grad.abs(), axis)
    how = {"producer": SCORES, "dequantized": torch.float32}
    ours = calls.gpu_backward(grad, scores, scale, None, grid, out=torch.empty_like(grad), **how)
    right = [
        near(ours.x, expected, size + size.sum(-1, keepdim=True) * p),
        near(ours.scale, of_scale, furthest),
    ]
    levels = calls.gpu_backward(grad, scores, scale, None, grid, out=grad, **how).dequantized
    right += [
        torch.equal(grad, ours.x),
        same(levels, reference.lsq_forward(p, scale, None, None, grid)),
    ]
    return [
        name
        for name, fine in zip(("scores", "scale", "in place", "levels"), right, strict=True)
        if not fine
    ]


def statsq(shape, axis, bits, dtype=torch.float32):
    """Levels of weights on every threshold; one row is all zero, one has a scale that is no number."""
    n = 2 ** (bits - 1)
    scale = torch.rand([size if i == axis else 1 for i, size in enumerate(shape)]).mul(4).ceil() / 4
    w = scale * torch.randint(-n - 1, n + 2, shape) / n
    w.select(axis, 0).zero_()
    scale.select(axis, 0).zero_()
    scale.select(axis, 1).fill_(torch.nan)
    w = torch.where(torch.rand(shape) < 0.5, w, torch.randn(shape)).to(dtype)
    expected = reference.statsq_forward(w, scale, bits)
    found = {
        d: gpu.statsq_forward(w, scale, bits, d)
        for d in (torch.float32, torch.bfloat16, torch.float16)
    }
    return [str(d) for d, ours in found.items() if ours.dtype != d or not same(ours, expected)]


def scales(rows, length, dtype=torch.float32):
    """Of weights with a row of zeros, one of equal weights and one with a value that is no number."""
    w = torch.randn(rows, length).to(dtype)
    w[0], w[1], w[2, 0] = 0.0, 0.75, torch.nan
    (levels, ours), expected = gpu.statsq(w, 2, torch.float32), statsq_scale(w)
    near_enough = torch.allclose(ours, expected, rtol=1e-6, atol=0, equal_nan=True)
    right = {
        "like": ours.dtype == torch.float32 and ours.shape == expected.shape,
        "sums": near_enough,
        "equal": ours[1] == 1.5,
        "levels": same(levels, reference.statsq_forward(w, ours, 2)),
    }
    return [name for name, fine in right.items() if not fine]


def steps(n):
    """Steps around a unit, changes of both signs, none and no number."""
    start, change = torch.rand(n) + 0.5, torch.randn(n)
    change[::5], change[1::7], start[2::11] = 0.0, torch.nan, torch.nan
    given = start, change.exp(), change, 1.0
    pairs = zip(("step", "slope"), gpu.step_and_slope(*given), step_and_slope(*given), strict=True)
    return [name for name, ours, expected in pairs if not same(ours, expected)]


def apart(shape, axis, n_offsets, bounds):
    """The middle third of something, as queries, keys and values are; so are its gradient and what takes that of the input."""
    x, scale, before, after, grid = case(shape, axis, n_offsets, bounds)
    mine, grad = (
        torch.full((*shape[:-1], 3 * shape[-1]), torch.nan).chunk(3, -1)[1] for _ in range(2)
    )
    wrong = differences(mine.copy_(x), scale, before, after, grid, grad=grad.normal_(), out=mine)
    return wrong + differences(x, scale, before, after, grid, grad=torch.ones(1).expand(shape))


def through(made, shape, axis, n_offsets, bounds, dtype=torch.float32):
    """Gradients of what was made into the input of a quantizer, against LayerNorm's or GELU's own backward pass of the reference's."""
    _, scale, before, after, grid = case(shape, axis, n_offsets, bounds)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    norm = (
        (torch.rand(shape[-1:]).to(dtype), torch.randn(shape[-1:]).to(dtype))
        if made.kind == "norm"
        else (None, None)
    )
    out, ours = torch.empty_like(x), torch.empty_like(x)
    how = {"dequantized": torch.float32, "after": after, "norm": norm, "producer": made}
    with mock.patch.object(operators, "_kernels_for", return_value=None):
        expected = calls.lsq_backward(grad, x, scale, before, grid, out=out, **how)
    found = calls.gpu_backward(grad, x, scale, before, grid, out=ours, **how)
    assert found.x is ours
    near_enough = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = zip(found._fields, found, expected, strict=True)
    return [
        name
        for name, a, b in pairs
        if (a is None) != (b is None)
        or (a is not None and (a - b).norm() > near_enough * b.float().norm())
    ]


def in_place(shape, axis, n_offsets, bounds):
    x, scale, before, after, grid = case(shape, axis, n_offsets, bounds)
    grad = torch.randn(shape)
    expected = calls.gpu_backward(grad, x, scale, before, grid, after=after)[:4]
    found = calls.gpu_backward(grad, x, scale, before, grid, after=after, out=grad)[:4]
    return (
        []
        if all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)) and found[0] is grad
        else ["in place"]
    )


def infinite(shape, axis, n_offsets, bounds):
    """Infinities in input and gradient, NaN in the gradient alone."""
    x, scale, before, after, grid = case(shape, axis, n_offsets, bounds)
    x.view(-1)[::3], x.view(-1)[1::3] = torch.inf, -torch.inf
    grad = torch.randn(shape)
    grad.view(-1)[0], grad.view(-1)[-1] = torch.nan, torch.inf
    found = calls.gpu_backward(grad, x, scale, before, grid, dequantized=torch.float32, after=after)
    expected = reference.lsq_backward(grad, x, scale, before, grid)
    levels = reference.lsq_forward(x, scale, before, after, grid)
    right = {
        "levels": same(found.dequantized, levels),
        "x": same(found.x, expected.x),
        "scale": torch.equal(found.scale.isfinite(), expected.scale.isfinite()),
    }
    return [name for name, fine in right.items() if not fine]


def in_strips(*form):
    """Each program of a backward pass has several tiles, as those of a large tensor."""
    with mock.patch.object(gpu, "PROGRAMS", 2):
        return differences(*case(*form))


def signs(*form):
    x, scale, before, after, grid = case(*form)
    return [
        str(s) + name
        for s in (1.0, 0.0, torch.nan)
        for name in differences(x, scale, before, after, grid, torch.tensor(s))
    ]


def other_dtypes(*form):
    x, scale, before, after, grid = case(*form)
    halves = (torch.bfloat16, torch.float16)
    return [
        f"{kind} {d}"
        for d in halves
        for dtype in (d, torch.float32)
        for kind in differences(
            x.clamp(-999, 999).to(dtype),
            scale,
            before,
            after,
            grid,
            grad=torch.randn(x.shape).to(d),
            dtype=d,
        )
    ]


def gradients_in_half_precision(shape, axis):
    """What is written in half precision is float32's, rounded once, also over the gradient that came."""
    x, scale, _, _, grid = case(shape, axis, 0, (0, 3))
    scores, wrong = x.abs().clamp(max=9), []
    for d in (torch.bfloat16, torch.float16):
        grad = torch.randn(shape).to(d)
        exact = calls.gpu_backward(
            grad, scores, scale, None, grid, producer=SCORES, dequantized=torch.float32
        )
        found = calls.gpu_backward(
            grad, scores, scale, None, grid, producer=SCORES, dequantized=d, out=grad
        )
        right = (
            same(grad, exact.x),
            torch.equal(found.scale, exact.scale),
            same(found.dequantized, exact.dequantized),
        )
        wrong += [] if all(right) and found.dequantized.dtype == d else [f"probabilities {d}"]
        given = scale, None, None, grid
        exact, grad = (
            calls.gpu_backward(torch.ones(shape), x, scale, None, grid),
            torch.ones(shape).to(d),
        )
        found = calls.gpu_backward(grad, x, scale, None, grid, out=grad)
        wrong += (
            []
            if found.x is grad and same(grad, exact.x) and torch.equal(found.scale, exact.scale)
            else [f"LSQ {d}"]
        )
        wrong += (
            []
            if same(calls.gpu_forward(x, *given, dtype=d), reference.lsq_forward(x, *given))
            else [f"forward {d}"]
        )
    return wrong


def declined():
    """What is left to the reference: nothing is computed."""
    x, scale, before, _, grid = case((2, 4, 6), 1, 1, (-2, 1))
    turned, long = x.transpose(0, 2), torch.ones(1, gpu.LONGEST + 1)
    with FakeTensorMode():
        fake = torch.empty(2, 4, 6)
    given = {
        "double": calls.gpu_forward(x.double(), scale, None, None, grid),
        "turned": calls.gpu_forward(turned, scale, None, None, grid),
        "fake": calls.gpu_forward(fake, scale, None, None, grid),
        "two offsets": calls.gpu_forward(x, scale, before, x[0].clone(), grid),
        "offset of rows": calls.gpu_forward(
            x, scale[:1], torch.ones(6, 1), None, CodeRange(-2, 1, None)
        ),
        "steps": calls.gpu_forward(x, scale[:1], None, None, grid),
        "steps apart": calls.gpu_forward(x, scale.repeat(2)[::2], None, None, grid),
        "no elements": calls.gpu_forward(x[:0], scale, None, None, grid),
        "out": calls.gpu_backward(x, x, scale, None, grid, out=x.double()),
        "dtype": calls.gpu_forward(x, scale, None, None, grid, dtype=torch.float64),
        "columns": gpu.statsq_forward(x[0], scale[:1].expand(1, 6).clone(), 2, torch.float32),
        "scales of rows that lie apart": gpu.statsq(x.flatten(0, 1)[::2], 2, torch.float32),
        "scales of a convolution": gpu.statsq(torch.ones(2, 3, 2, 2), 2, torch.float32),
        "scales of double": gpu.statsq(x[0].double(), 2, torch.float32),
        "expanded": calls.gpu_forward(torch.ones(1, 1, 1).expand(2, 4, 6), scale, None, None, grid),
        "long": calls.gpu_backward(
            long, long, scale[:1], None, CodeRange(0, 3, None), producer=SCORES
        ),
    }
    return [name for name, found in given.items() if found is not None]


def checked():
    """Kernels that give wrong numbers, and those that do not compile, are not used."""
    wrong, broken = (
        mock.Mock(side_effect=lambda g, x, q, *_, **__: (q.scale, None, None)),
        mock.Mock(side_effect=OSError("no compiler\nat all")),
    )
    found = [gpu.available()]
    for bad in (wrong, broken):
        gpu.available.cache_clear()
        with (
            mock.patch.object(gpu, "lsq_backward", bad),
            mock.patch.object(library.log, "info") as said,
        ):
            found += [gpu.available(), said.call_args.args[2]]
    gpu.available.cache_clear()
    return (
        []
        if found
        == [True, False, "its kernels give other numbers here", False, "OSError: no compiler"]
        else found
    )


MADE = {"norm": Made("norm", 1e-5), "gelu": Made("none")}
CASES = {
    **{f"through {kind}, {form}, {bounds}": (through, made, *FORMS[form], BOUNDS[bounds])
       for kind, made in MADE.items()
       for bounds in ("unsigned", "three bits", "half steps")
       for form in ("tokens", "tokens, no offsets", "channels", "one step, offsets", "a row wider than a tile", "many short rows")},
    **{f"through {kind}, {dtype}": (through, made, *FORMS["tokens"], BOUNDS["signed"], dtype)
       for kind, made in MADE.items()
       for dtype in (torch.bfloat16, torch.float16)},
    **{f"{form}, {bounds}": (lambda *a: differences(*case(*a)), *FORMS[form], BOUNDS[bounds]) for form in FORMS for bounds in BOUNDS},
    **{f"{name}: {form}": (f, *FORMS[form], (-2, 1))
       for name, f, forms in (
           ("NaN", without_a_number, ("tokens", "channels", "heads")),
           ("apart", apart, ("tokens", "channels")),
           ("in place", in_place, ("tokens", "channels", "length 7", "length 127", "length 129", "length 4097")),
           ("infinity", infinite, ("tokens", "channels", "length 129")),
           ("strips", in_strips, ("many short rows", "channels, no offsets", "a row wider than a tile")),
           ("sign", signs, ("pixels", "channels")),
           ("dtypes", other_dtypes, ("tokens", "channels")),
       ) for form in forms},
    **{f"statsq {shape} {axis} {bits}": (statsq, shape, axis, bits)
       for shape, axis in (((5, 24), 0), ((4, 3, 2, 2), 0)) for bits in (2, 8)},
    **{f"scales {length}": (scales, 5, length) for length in (1, 24, 197, 3000)},
    "scales bfloat16": (scales, 5, 768, torch.bfloat16),
    "statsq bfloat16": (statsq, (5, 24), 0, 4, torch.bfloat16),
    "probabilities": (probs, (2, 3, 9, 9), -2),
    "in half precision": (gradients_in_half_precision, (2, 3, 9, 9), -2),
    "in half precision, wide": (gradients_in_half_precision, (2, 3, 1100), 1),
    "probabilities, hidden keys": (probs, (2, 3, 9, 16), -2, torch.float16, 7),
    "probabilities, one step": (probs, (2, 3, 7, 300), None),
    "probabilities, bfloat16": (probs, (2, 3, 9, 9), -2, torch.bfloat16),
    **{f"steps {n}": (steps, n) for n in (1, 197, 5000)},
    "declined": (declined,),
    "checked": (checked,),
}  # fmt: skip
