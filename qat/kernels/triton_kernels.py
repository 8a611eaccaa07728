"""The kernels in Triton, for tiles of BLOCK_R rows and BLOCK_C columns. Imported only where Triton is there.

All is computed in float32; what is written is rounded to nearest, half to even, to the dtype of the tensor that takes it.

Forward results are the bits of `reference`: division rounds to nearest, rounding is half to even, every comparison lets NaN through, and
`gpu` launches without contraction of products and sums. Sums are written per program and added afterwards: no atomics, the same order
in every run. Triton reads the annotations, so they are no text, and pointers to tensors go by the name of what they point to.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

# Adding and subtracting it rounds whatever is below 2^22, half to even.
MAGIC = constexpr(1.5 * 2.0**23)
# Quotients from here on are not corrected: they are out of the range of every code, or infinite.
FAR = constexpr(2.0**22)
FLOOR = constexpr(1e-5)
TINY = constexpr(2.0**-126)
TOP_CLIP = constexpr(1 - 1e-6)
# Of the normal distribution, for GELU: sqrt(1/2), and its density at 0.
SQRT_HALF, DENSITY = constexpr(0.7071067811865476), constexpr(0.3989422804014327)


@triton.jit
def _bounds(low: tensor, high: tensor, sign: tensor) -> tuple[tensor, tensor]:
    """Codes from 0 where the input turned out to have no negative values."""
    if sign is not None:
        is_signed = tl.load(sign).to(tl.float32) > 0.0
        high = tl.where(is_signed, high, high - low)
        low = tl.where(is_signed, low, 0.0)
    return low, high


@triton.jit
def _clamped(u: tensor, low: tensor, high: tensor) -> tensor:
    if low is not None:
        u = tl.where(u < low, low, u)
    return tl.where(u > high, high, u)


@triton.jit
def _quotient(x: tensor, step: tensor) -> tensor:
    """`x / step` to nearest: x times the reciprocal, corrected by what is left over. Unlike a division it has no branches.

    With a reciprocal that is rounded to nearest one correction is enough (P. Markstein, IBM J. Res. Dev. 34, 1990).
    """
    inverse = tl.div_rn(1.0, step)
    u = x * inverse
    return tl.where(tl.abs(u) < FAR, tl.fma(tl.fma(-u, step, x), inverse, u), u)


@triton.jit
def _rounded(u: tensor) -> tensor:
    """Half to even, with the sign of a zero, which is that of `u`."""
    whole, sign = (u + MAGIC) - MAGIC, u.to(tl.int32, bitcast=True) & -(2**31)
    return (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _level(u: tensor, high: tensor, HALF: constexpr) -> tensor:
    """In steps; of half steps the highest is half a step below the end of the range."""
    if HALF:
        k = _rounded(u - 0.5)
        return tl.where(k > high - 1.0, high - 1.0, k) + 0.5
    return _rounded(u)


@triton.jit
def _step(scale: tensor, index: tensor, inside: tensor) -> tensor:
    step = tl.load(scale + index, mask=inside, other=1.0).to(tl.float32)
    return tl.where(step < FLOOR, FLOOR, step)


@triton.jit
def _inside(row: tensor, column: tensor, rows: tensor, length: tensor) -> tensor:
    return (row < rows)[:, None] & (column < length)[None, :]


@triton.jit
def _places(row: tensor, column: tensor, stride: tensor) -> tensor:
    return row.to(tl.int64)[:, None] * stride + column[None, :]


@triton.jit
def _read(x: tensor, places: tensor, inside: tensor) -> tensor:
    return tl.load(x + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _columns(x: tensor, column: tensor, length: tensor) -> tensor:
    """One number for each column, (1, columns)."""
    return tl.load(x + column, mask=column < length, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _plus(tile: tensor, offset: tensor) -> tensor:
    return tile if offset is None else tile + offset


@triton.jit
def _remade(  # noqa: PLR0913, PLR0917
    x: tensor,
    weight: tensor,
    bias: tensor,
    column: tensor,
    length: tensor,
    number: tensor,
    MADE: constexpr,
    DTYPE: constexpr,
) -> tuple[tensor, tensor, tensor]:
    """What was made of x, and what its gradient needs: normalised rows and one over their deviation, GELU's share of x, probabilities."""
    made, unit, inverse = x, x, 1.0
    if MADE == "norm":
        each = tl.div_rn(1.0, 1.0 * length)
        away = tl.where((column < length)[None, :], x - (tl.sum(x, 1) * each)[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(away * away, 1) * each + number)[:, None]
        unit = away * inverse
        made = _plus(unit if weight is None else unit * weight, bias)
    if MADE == "none":
        unit = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        made = x * unit
    if MADE == "scores":
        scores = tl.where((column < length)[None, :], x, float("-inf"))
        power = tl.exp(scores - tl.max(scores, 1)[:, None])
        unit = power * tl.div_rn(1.0, tl.sum(power, 1))[:, None]
        return unit, unit, inverse
    return made.to(DTYPE).to(tl.float32), unit, inverse


@triton.jit
def _through(  # noqa: PLR0913
    grad: tensor,
    x: tensor,
    unit: tensor,
    inverse: tensor,
    weight: tensor,
    length: tensor,
    number: tensor,
    MADE: constexpr,
) -> tensor:
    """The gradient of x from that of what was made of it."""
    if MADE == "norm":
        grad = grad if weight is None else grad * weight
        each = tl.div_rn(1.0, 1.0 * length)
        along, across = (tl.sum(grad, 1) * each)[:, None], (tl.sum(grad * unit, 1) * each)[:, None]
        grad = (grad - along - unit * across) * inverse
    if MADE == "none":
        grad = grad * (unit + x * DENSITY * tl.exp(-0.5 * x * x))
    if MADE == "scores":
        grad = (grad - tl.sum(grad * unit, 1)[:, None]) * unit * number
    return grad


@triton.jit
def _errors(
    grad: tensor, u: tensor, low: tensor, high: tensor, HALF: constexpr
) -> tuple[tensor, tensor, tensor]:
    """Gradient of the input, what an element adds to that of the step, 0 where `grad` is, and the value in steps."""
    clamped = _clamped(u, low, high)
    is_out = u > high if low is None else (u < low) | (u > high)
    inner, code = tl.where(is_out, 0.0, grad), _level(clamped, high, HALF)
    return inner, grad * code - inner * clamped, code


@triton.jit
def _keep(sums: tensor, tile: tensor, column: tensor, length: tensor, place: tensor) -> None:
    """Write the sums of the columns as the row at `place`."""
    tl.store(sums + place.to(tl.int64) * length + column, tl.sum(tile, 0), mask=column < length)


@triton.jit
def _keep_wanted(
    sums: tensor, tiles: tensor, column: tensor, length: tensor, WANTED: constexpr
) -> None:
    """Write the sums of the columns of WANTED tiles: a row of a program behind the other's, tile by tile."""
    place = tl.program_id(0)
    for i in tl.static_range(4):
        if WANTED[i]:
            _keep(sums, tiles[i], column, length, place)
            place += tl.num_programs(0)


@triton.jit(do_not_specialize=["rows", "steps"])
def lsq_forward(  # noqa: PLR0913  (a kernel is given where everything lies)
    x: tensor,
    y: tensor,
    scale: tensor,
    before: tensor,
    after: tensor,
    sign: tensor,
    low: tensor,
    high: tensor,
    rows: tensor,
    length: tensor,
    stride: tensor,
    steps: tensor,
    HALF: constexpr,
    BY_COLUMN: constexpr,
    BLOCK_R: constexpr,
    BLOCK_C: constexpr,
) -> None:
    """`reference.lsq_forward`; before, after and sign may be None."""
    low, high = _bounds(low, high, sign)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = _inside(row, column, rows, length)
    step = (
        _step(scale, column, column < length)[None, :]
        if BY_COLUMN
        else _step(scale, row % steps, row < rows)[:, None]
    )
    shifted = _read(x, _places(row, column, stride), inside)
    if before is not None:
        shifted += _columns(before, column, length)
    level = _level(_clamped(_quotient(shifted, step), low, high), high, HALF) * step
    if after is not None:
        level += _columns(after, column, length)
    tl.store(y + _places(row, column, length), level, mask=inside)


@triton.jit(do_not_specialize=["rows", "steps", "strip"])
def lsq_backward(  # noqa: PLR0913
    g: tensor,
    x: tensor,
    dx: tensor,
    scale: tensor,
    before: tensor,
    after: tensor,
    sign: tensor,
    y: tensor,
    errors: tensor,
    sums: tensor,
    weight: tensor,
    bias: tensor,
    low: tensor,
    high: tensor,
    rows: tensor,
    length: tensor,
    g_stride: tensor,
    x_stride: tensor,
    dx_stride: tensor,
    steps: tensor,
    strip: tensor,
    number: tensor,
    UNIT: constexpr,
    WANTED: constexpr,
    MADE: constexpr,
    HALF: constexpr,
    BY_COLUMN: constexpr,
    BLOCK_R: constexpr,
    BLOCK_C: constexpr,
) -> None:
    """`reference.lsq_backward`; a program walks down a strip of rows.

    `errors` takes the sums for the steps, (rows, programs across), or, by column, (strips, length); `sums` those WANTED of columns, for
    the offset before, the one after, a LayerNorm's weight and its bias, (k, strips, length); `y`, or None, what the forward pass gave. A
    strip has `strip` rows, a multiple of BLOCK_R. Of an input that was made of `x`, by a LayerNorm (MADE = "norm"; whole rows in a tile),
    by GELU ("none") or by a softmax ("scores"; whole rows, too), `dx` is the gradient of `x`. Length and strides of rows are in UNITs:
    what is a multiple of 16 Triton finds out by itself, and 8 elements of half precision are the 16 bytes that one instruction reads.
    """
    low, high = _bounds(low, high, sign)
    length, g_stride, x_stride, dx_stride = (
        length * UNIT,
        g_stride * UNIT,
        x_stride * UNIT,
        dx_stride * UNIT,
    )
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Not in the loop, where each would be waited for.
    shift = None if before is None else _columns(before, column, length)
    shift_back = None if after is None else _columns(after, column, length)
    weights = None if weight is None else _columns(weight, column, length)
    biases = None if bias is None else _columns(bias, column, length)
    step_row, zero = (
        _step(scale, column, (column < length) & BY_COLUMN)[None, :],
        tl.zeros((BLOCK_R, BLOCK_C), tl.float32),
    )
    error, sum_dx, sum_g, sum_dw = zero, zero, zero, zero
    for first in range(0, strip, BLOCK_R):
        row = tl.program_id(0) * strip + first + tl.arange(0, BLOCK_R)
        inside = _inside(row, column, rows, length)
        step = step_row if BY_COLUMN else _step(scale, row % steps, row < rows)[:, None]
        grad, value = (
            _read(g, _places(row, column, g_stride), inside),
            _read(x, _places(row, column, x_stride), inside),
        )
        made, unit, inverse = _remade(
            value, weights, biases, column, length, number, MADE, x.dtype.element_ty
        )
        inner, wrong, code = _errors(grad, _quotient(_plus(made, shift), step), low, high, HALF)
        sum_dx, sum_g, sum_dw = sum_dx + inner, sum_g + grad, sum_dw + inner * unit
        of_x = _through(inner, value, unit, inverse, weights, length, number, MADE)
        tl.store(dx + _places(row, column, dx_stride), of_x, mask=inside)
        if y is not None:
            tl.store(y + _places(row, column, length), _plus(code * step, shift_back), mask=inside)
        if BY_COLUMN:
            error += wrong
        else:
            tl.store(
                errors + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1),
                tl.sum(wrong, 1),
                mask=row < rows,
            )
    if BY_COLUMN:
        _keep(errors, error, column, length, tl.program_id(0))
    _keep_wanted(sums, (sum_dx, sum_g, sum_dw, sum_dx), column, length, WANTED)


@triton.jit(do_not_specialize=["n"])
def step_and_slope(
    step: tensor,
    slope: tensor,
    start: tensor,
    growth: tensor,
    change: tensor,
    n: tensor,
    unit: tensor,
    BLOCK: constexpr,
) -> None:
    """`step_and_slope` of `qat.functional.lsq`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    s, t = tl.load(start + i, mask=inside), tl.load(change + i, mask=inside)
    g, lacking = s * tl.load(growth + i, mask=inside), tl.where(s < unit, unit, s) - s
    tl.store(step + i, g + lacking * tl.where(t < 0.0, 0.0, t), mask=inside)
    tl.store(slope + i, g + lacking * tl.where(t > 0.0, 1.0, tl.where(t == t, 0.0, t)), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def statsq_forward(  # noqa: PLR0913
    w: tensor,
    y: tensor,
    scale: tensor,
    n: tensor,
    rows: tensor,
    length: tensor,
    FIND: constexpr,
    BLOCK_R: constexpr,
    BLOCK_C: constexpr,
) -> None:
    """`reference.statsq_forward`; n = 2^(bits-1). With FIND, `scale` takes the scales of the rows, which are found before."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if FIND:
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for first in range(0, length, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            total += tl.abs(
                _read(w, _places(row, column, length), _inside(row, column, rows, length))
            )
        s = 2.0 * tl.div_rn(tl.sum(total, 1), 1.0 * length)
        tl.store(scale + row, s, mask=row < rows)
    else:
        s = tl.load(scale + row, mask=row < rows, other=1.0).to(tl.float32)
    s = s[:, None]
    for first in range(0, length, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        inside, places = _inside(row, column, rows, length), _places(row, column, length)
        u = _clamped(
            tl.div_rn(_read(w, places, inside), tl.where(s < TINY, TINY, s)), -1.0, TOP_CLIP
        )
        tl.store(y + places, tl.div_rn(_rounded(u * n - 0.5) + 0.5, n) * s, mask=inside)
