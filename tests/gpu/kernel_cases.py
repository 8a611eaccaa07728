"""Cases of kernels: each returns the names of the results that differ from the reference.

The first argument of a case is the module that computes: `operators`, which choose a kernel, or
`gpu`. Tensors are on torch's default device: with `gpu`, a GPU, or the CPU with TRITON_INTERPRET=1,
which Triton reads when it is imported. Inputs are anywhere, halfway between codes, on the ends of
the range, one float next to them, and far outside.
"""

from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qat.functional.lsq import broadcast_step, step_and_slope
from qat.functional.statsq import statsq_scale
from qat.functional.ste import sum_along
from qat.kernels import CodeRange, Producer, gpu, library, operators, reference
from tests.kernels import calls

SCORES = Producer("scores", factor=0.3)
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
    x = values(broadcast_step(scale, len(shape), grid), shape, *bounds)
    before, after = (
        torch.randn(shape[-n_offsets:]).round() if n_offsets else None for _ in range(2)
    )
    return x, scale, before, after, grid


def wrong(**is_right):
    """Names of the results that are not right."""
    return [name for name, right in is_right.items() if not right]


def differences(
    module, x, scale, before, after, grid, sign=None, grad=None, out=None, dtype=torch.float32
):
    """Both passes; the forward pass returns `dtype`, None = it is not part of the backward pass."""
    grad = torch.randn(x.shape) if grad is None else grad
    shape = None if after is None else after.shape
    expected, sizes = (
        reference.lsq_backward(g, x, scale, before, grid, sign=sign, after_shape=shape)
        for g in (grad, grad.abs())
    )
    furthest = 2 * max(-grid.qmin, grid.qmax) * sum_along(grad.float().abs(), grid.axis)
    expected_y = reference.lsq_forward(x, scale, before, after, grid, sign=sign)
    how = {"sign": sign, "module": module}
    y = calls.lsq_forward(x, scale, before, after, grid, dtype=dtype or torch.float32, **how)
    found = calls.lsq_backward(
        grad, x, scale, before, grid, dequantized=dtype, after=after, out=out, **how
    )
    is_right = {
        "forward": same(y, expected_y),
        "dtype": found.x.dtype == (x if out is None else out).dtype,
        "out": out is None or found.x is out,
        "x": same(found.x, expected.x),
        "scale": near(found.scale, expected.scale, furthest),
    }
    if dtype is not None:
        is_right["dequantized"] = found.dequantized.dtype == dtype
        is_right["levels"] = same(found.dequantized, expected_y)
    for name in ("before", "after"):
        a, b, size = (getattr(each, name) for each in (found, expected, sizes))
        is_right[name] = a is None if b is None else near(a, b, size)
    return wrong(**is_right)


def plain(module, *form):
    return differences(module, *case(*form))


def one_offset(module, *form):
    x, scale, before, after, grid = case(*form)
    only_before = differences(module, x, scale, before, None, grid)
    return only_before + differences(module, x, scale, None, after, grid)


def without_a_number(module, *form):
    x, scale, before, after, grid = case(*form)
    scale[-1], x[0, 0] = torch.nan, torch.nan
    y = calls.lsq_forward(x, scale, before, after, grid, module=module)
    expected = reference.lsq_forward(x, scale, before, after, grid)
    return wrong(forward=same(y, expected) and y.isnan().any())


def probs(module, shape, axis, dtype=torch.float32, hidden=0):
    """Through a softmax: `gpu` computes it from the scores, `operators` get probabilities."""
    x, scale, _, _, grid = case(shape, axis, 0, (0, 3))
    scores, grad = x.abs().clamp(max=9).to(dtype), torch.randn(shape)
    if hidden:
        scores[..., -hidden:] = -torch.inf
    p = scores.softmax(-1, dtype=torch.float32)
    expected, grad_scale = calls.softmax_reference(grad, p, scale, grid, 0.3)
    size, furthest = grad.abs() * p, 6 * sum_along(grad.abs(), axis)
    how = {"module": module, "dequantized": torch.float32}
    how["producer"] = SCORES if module is gpu else Producer("softmax", factor=0.3)
    given = scores if module is gpu else p
    ours = calls.lsq_backward(grad, given, scale, None, grid, out=torch.empty_like(grad), **how)
    levels = calls.lsq_backward(grad, given, scale, None, grid, out=grad, **how).dequantized
    return wrong(
        scores=near(ours.x, expected, size + size.sum(-1, keepdim=True) * p),
        scale=near(ours.scale, grad_scale, furthest),
        in_place=torch.equal(grad, ours.x),
        levels=same(levels, reference.lsq_forward(p, scale, None, None, grid)),
    )


def statsq(module, shape, axis, bits, dtype=torch.float32):
    """Levels of weights on every threshold; one row is zero, one has a scale of NaN."""
    n = 2 ** (bits - 1)
    scale = torch.rand([size if i == axis else 1 for i, size in enumerate(shape)]).mul(4).ceil() / 4
    w = scale * torch.randint(-n - 1, n + 2, shape) / n
    w.select(axis, 0).zero_()
    scale.select(axis, 0).zero_()
    scale.select(axis, 1).fill_(torch.nan)
    w = torch.where(torch.rand(shape) < 0.5, w, torch.randn(shape)).to(dtype)
    expected = reference.statsq_forward(w, scale, bits)
    found = {
        d: module.statsq_forward(w, scale, bits, d)
        for d in (torch.float32, torch.bfloat16, torch.float16)
    }
    return [str(d) for d, ours in found.items() if ours.dtype != d or not same(ours, expected)]


def scales(module, rows, length, dtype=torch.float32):
    """Scales of weights with a row of zeros, one of equal weights and one with a NaN."""
    w = torch.randn(rows, length).to(dtype)
    w[0], w[1], w[2, 0] = 0.0, 0.75, torch.nan
    (levels, ours), expected = module.statsq(w, 2, torch.float32), statsq_scale(w)
    return wrong(
        like=ours.dtype == torch.float32 and ours.shape == expected.shape,
        sums=torch.allclose(ours, expected, rtol=1e-6, atol=0, equal_nan=True),
        equal=ours[1] == 1.5,
        levels=same(levels, reference.statsq_forward(w, ours, 2)),
    )


def steps(module, n):
    """Steps around a unit; changes of both signs, zeros and NaN."""
    start, change = torch.rand(n) + 0.5, torch.randn(n)
    change[::5], change[1::7], start[2::11] = 0.0, torch.nan, torch.nan
    given = start, change.exp(), change, 1.0
    step, slope = module.step_and_slope(*given)
    expected_step, expected_slope = step_and_slope(*given)
    return wrong(step=same(step, expected_step), slope=same(slope, expected_slope))


def apart(module, *form):
    """The middle third of a tensor, as queries, keys and values are; its gradients too."""
    x, scale, before, after, grid = case(*form)
    mine, grad = (
        torch.full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan).chunk(3, -1)[1] for _ in range(2)
    )
    parts = scale, before, after, grid
    third = differences(module, mine.copy_(x), *parts, grad=grad.normal_(), out=mine)
    return third + differences(module, x, *parts, grad=torch.ones(1).expand(x.shape))


def through(module, made, shape, axis, n_offsets, bounds, dtype=torch.float32):
    """Gradients of the input of a LayerNorm or GELU before a quantizer, by the formulas."""
    _, scale, before, after, grid = case(shape, axis, n_offsets, bounds)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    norm = None, None
    if made.kind == "norm":
        norm = torch.rand(shape[-1:]).to(dtype), torch.randn(shape[-1:]).to(dtype)
    out, ours = torch.empty_like(x), torch.empty_like(x)
    how = {"dequantized": torch.float32, "after": after, "norm": norm, "producer": made}
    with mock.patch.object(operators, "_kernels_for", return_value=None):
        expected = calls.lsq_backward(grad, x, scale, before, grid, out=out, **how)
    found = calls.lsq_backward(grad, x, scale, before, grid, out=ours, module=module, **how)
    assert found.x is ours
    near_enough = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = zip(found._fields, found, expected, strict=True)
    return [
        name
        for name, a, b in pairs
        if (a is None) != (b is None)
        or (a is not None and (a - b).norm() > near_enough * b.float().norm())
    ]


def in_place(module, *form):
    x, *quantizer = case(*form)
    grad = torch.randn(x.shape)
    return differences(module, x, *quantizer, grad=grad, out=grad, dtype=None)


def infinite(module, *form):
    """Infinities in input and gradient, NaN only in the gradient."""
    x, scale, before, after, grid = case(*form)
    x.view(-1)[::3], x.view(-1)[1::3] = torch.inf, -torch.inf
    grad = torch.randn(x.shape)
    grad.view(-1)[0], grad.view(-1)[-1] = torch.nan, torch.inf
    how = {"dequantized": torch.float32, "after": after, "module": module}
    found = calls.lsq_backward(grad, x, scale, before, grid, **how)
    expected = reference.lsq_backward(grad, x, scale, before, grid)
    return wrong(
        levels=same(found.dequantized, reference.lsq_forward(x, scale, before, after, grid)),
        x=same(found.x, expected.x),
        scale=torch.equal(found.scale.isfinite(), expected.scale.isfinite()),
    )


def in_strips(module, *form):
    """Each program of a backward pass has several tiles, as those of a large tensor."""
    with mock.patch.object(module, "NUM_PROGRAMS", 2):
        return plain(module, *form)


def signs(module, *form):
    quantizer = case(*form)
    return [
        str(s) + name
        for s in (1.0, 0.0, torch.nan)
        for name in differences(module, *quantizer, torch.tensor(s))
    ]


def other_dtypes(module, *form):
    """Half precision; for inputs in float32, gradients are written over the incoming one."""
    x, *quantizer = case(*form)
    names = []
    for d in (torch.bfloat16, torch.float16):
        for dtype in (d, torch.float32):
            grad = torch.randn(x.shape).to(d)
            how = {"grad": grad, "out": grad if dtype == torch.float32 else None, "dtype": d}
            found = differences(module, x.clamp(-999, 999).to(dtype), *quantizer, **how)
            names += [f"{name} {d}" for name in found]
    return names


def probs_in_half_precision(module, shape, axis):
    """Results are float32's, rounded once, also over the incoming gradient."""
    x, scale, _, _, grid = case(shape, axis, 0, (0, 3))
    scores, names = x.abs().clamp(max=9), []
    how = {"module": module, "producer": SCORES}
    for d in (torch.bfloat16, torch.float16):
        grad = torch.randn(shape).to(d)
        given = grad, scores, scale, None, grid
        exact = calls.lsq_backward(*given, dequantized=torch.float32, **how)
        found = calls.lsq_backward(*given, dequantized=d, out=grad, **how)
        names += wrong(
            dtype=found.dequantized.dtype == d,
            scores=same(grad, exact.x),
            scale=torch.equal(found.scale, exact.scale),
            levels=same(found.dequantized, exact.dequantized),
        )
    return names


def declined(module):
    """Tensors that no kernel takes: nothing is computed."""
    x, scale, before, _, grid = case((2, 4, 6), 1, 1, (-2, 1))
    turned, long = x.transpose(0, 2), torch.ones(1, gpu.MAX_ROW_LENGTH + 1)
    with FakeTensorMode():
        fake = torch.empty(2, 4, 6)

    def forward(x, scale=scale, before=None, after=None, grid=grid, dtype=torch.float32):
        return calls.lsq_forward(x, scale, before, after, grid, dtype=dtype, module=module)

    def scales_of(w):
        return module.statsq(w, 2, torch.float32)

    one_step = CodeRange(-2, 1, None)
    given = {
        "double": forward(x.double()),
        "turned": forward(turned),
        "fake": forward(fake),
        "two offsets": forward(x, scale, before, x[0].clone()),
        "offset of rows": forward(x, scale[:1], torch.ones(6, 1), grid=one_step),
        "steps": forward(x, scale[:1]),
        "steps apart": forward(x, scale.repeat(2)[::2]),
        "no elements": forward(x[:0]),
        "out": calls.gpu_backward(x, x, scale, None, grid, out=x.double()),
        "dtype": forward(x, dtype=torch.float64),
        "columns": module.statsq_forward(x[0], scale[:1].expand(1, 6).clone(), 2, torch.float32),
        "scales of rows that lie apart": scales_of(x.flatten(0, 1)[::2]),
        "scales of a convolution": scales_of(torch.ones(2, 3, 2, 2)),
        "scales of double": scales_of(x[0].double()),
        "expanded": forward(torch.ones(1, 1, 1).expand(2, 4, 6)),
        "long": calls.gpu_backward(
            long, long, scale[:1], None, CodeRange(0, 3, None), producer=SCORES
        ),
    }
    return [name for name, found in given.items() if found is not None]


def checked(_):
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
    expected = [
        True,
        False,
        "its kernels disagree with the reference implementation",
        False,
        "OSError: no compiler",
    ]
    return [] if found == expected else found


MADE = {"norm": Producer("norm", 1e-5), "gelu": Producer("gelu")}
# Cases of every device.
SHARED = {
    **{f"{form}, {bounds}": (plain, *FORMS[form], BOUNDS[bounds]) for form in FORMS for bounds in BOUNDS},
    **{f"{name}: {form}": (f, *FORMS[form], (-2, 1))
       for name, f, forms in (
           ("NaN", without_a_number, ("tokens", "channels", "heads")),
           ("one offset", one_offset, ("tokens", "channels")),
           ("apart", apart, ("tokens", "channels")),
           ("in place", in_place, ("tokens", "channels", "length 7", "length 127", "length 129", "length 4097")),
           ("infinity", infinite, ("tokens", "channels", "length 129")),
           ("sign", signs, ("pixels", "channels")),
           ("dtypes", other_dtypes, ("tokens", "channels", "heads", "a row wider than a tile")),
       ) for form in forms},
    **{f"statsq {shape} {axis} {bits}": (statsq, shape, axis, bits)
       for shape, axis in (((5, 24), 0), ((4, 3, 2, 2), 0)) for bits in (2, 3, 8)},
    "statsq bfloat16": (statsq, (5, 24), 0, 4, torch.bfloat16),
    "probabilities": (probs, (2, 3, 9, 9), -2),
    "probabilities, hidden keys": (probs, (2, 3, 9, 16), -2, torch.float16, 7),
    "probabilities, one step": (probs, (2, 3, 7, 300), None),
    "probabilities, bfloat16": (probs, (2, 3, 9, 9), -2, torch.bfloat16),
}  # fmt: skip
CASES = {
    **{f"through {kind}, {form}, {bounds}": (through, made, *FORMS[form], BOUNDS[bounds])
       for kind, made in MADE.items()
       for bounds in ("unsigned", "three bits", "half steps")
       for form in ("tokens", "tokens, no offsets", "channels", "one step, offsets", "a row wider than a tile", "many short rows")},
    **{f"through {kind}, {dtype}": (through, made, *FORMS["tokens"], BOUNDS["signed"], dtype)
       for kind, made in MADE.items()
       for dtype in (torch.bfloat16, torch.float16)},
    **SHARED,
    **{f"strips: {form}": (in_strips, *FORMS[form], (-2, 1))
       for form in ("many short rows", "channels, no offsets", "a row wider than a tile")},
    "in half precision": (probs_in_half_precision, (2, 3, 9, 9), -2),
    "in half precision, wide": (probs_in_half_precision, (2, 3, 1100), 1),
    **{f"scales {length}": (scales, 5, length) for length in (1, 24, 197, 3000)},
    "scales bfloat16": (scales, 5, 768, torch.bfloat16),
    **{f"steps {n}": (steps, n) for n in (1, 197, 5000)},
    "declined": (declined,),
    "checked": (checked,),
}  # fmt: skip
