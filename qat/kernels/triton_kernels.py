"""Triton kernels for tiles of BLOCK_R rows and BLOCK_C columns. The import needs Triton.

Kernels compute in float32; results are rounded to nearest, half to even, to the dtype of the tensor
to which they are written.

For the same quantizer input and scale, forward results are bit-identical to `reference`: division
rounds to nearest, rounding is half to even, every comparison lets NaN through, and `gpu` launches
kernels without fusing products and sums. Each program writes its own sums, without atomic
operations; the sums are added up afterwards, in the same order in every run. Triton evaluates the
annotations, so they are not strings. A pointer has the name of the tensor that it points to.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

# Adding and then subtracting this number rounds any u with |u| < 2^22, half to even.
MAGIC = constexpr(1.5 * 2.0**23)
# Quotients of at least this size are not corrected, because they are outside the range of all codes
# or infinite.
MIN_UNCORRECTED = constexpr(2.0**22)
FLOOR = constexpr(1e-5)
TINY = constexpr(2.0**-126)
TOP_CLIP = constexpr(1 - 1e-6)
# For GELU: sqrt(1/2), and the density of the normal distribution at 0.
SQRT_HALF = constexpr(0.7071067811865476)
DENSITY = constexpr(0.3989422804014327)


@triton.jit
def _bounds(low: tensor, high: tensor, sign: tensor) -> tuple[tensor, tensor]:
    """The bounds; moved to start at 0 if `sign` is at most 0 (input without negative values)."""
    if sign is not None:
        is_signed = tl.load(sign).to(tl.float32) > 0.0
        high = tl.where(is_signed, high, high - low)
        low = tl.where(is_signed, low, 0.0)
    return low, high


@triton.jit
def _clamp(u: tensor, low: tensor, high: tensor) -> tensor:
    if low is not None:
        u = tl.where(u < low, low, u)
    return tl.where(u > high, high, u)


@triton.jit
def _quotient(x: tensor, step: tensor) -> tensor:
    """`x / step`: x times the reciprocal; below `MIN_UNCORRECTED`, corrected by the remainder.

    Unlike a division per element, this has no branches. If the reciprocal is rounded to nearest,
    one correction rounds to nearest, too (P. Markstein, IBM J. Res. Dev. 34, 1990).
    """
    inverse = tl.div_rn(1.0, step)
    u = x * inverse
    return tl.where(tl.abs(u) < MIN_UNCORRECTED, tl.fma(tl.fma(-u, step, x), inverse, u), u)


@triton.jit
def _round(u: tensor) -> tensor:
    """`u` rounded half to even; a result of zero has the sign of `u`."""
    integer = (u + MAGIC) - MAGIC
    sign = u.to(tl.int32, bitcast=True) & -(2**31)
    return (integer.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _nearest_code(u: tensor, high: tensor, HALF: constexpr) -> tensor:
    """`CodeRange.nearest` in Triton: the code nearest to clamped `u`.

    With half steps, the highest code is half a step below `high`.
    """
    if HALF:
        k = _round(u - 0.5)
        return tl.where(k > high - 1.0, high - 1.0, k) + 0.5
    return _round(u)


@triton.jit
def _step_size(scale: tensor, index: tensor, inside: tensor) -> tensor:
    step = tl.load(scale + index, mask=inside, other=1.0).to(tl.float32)
    return tl.where(step < FLOOR, FLOOR, step)


@triton.jit
def _is_inside(row: tensor, column: tensor, rows: tensor, length: tensor) -> tensor:
    """Mask of the elements of a tile that are inside of the tensor."""
    return (row < rows)[:, None] & (column < length)[None, :]


@triton.jit
def _offsets(row: tensor, column: tensor, stride: tensor) -> tensor:
    """Offsets in memory of the elements of a tile."""
    return row.to(tl.int64)[:, None] * stride + column[None, :]


@triton.jit
def _read(x: tensor, offsets: tensor, inside: tensor) -> tensor:
    return tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _columns(x: tensor, column: tensor, length: tensor) -> tensor:
    """One number for each column, (1, columns)."""
    return tl.load(x + column, mask=column < length, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _add_optional(tile: tensor, offset: tensor) -> tensor:
    """`tile + offset`, or `tile` if the offset is None."""
    return tile if offset is None else tile + offset


@triton.jit
def _produce(  # noqa: PLR0913, PLR0917
    x: tensor,
    weight: tensor,
    bias: tensor,
    column: tensor,
    length: tensor,
    eps: tensor,
    PRODUCER: constexpr,
    DTYPE: constexpr,
) -> tuple[tensor, tensor, tensor]:
    """Compute the input of the quantizer from x by PRODUCER, and tensors for `_produce_backward`.

    The tensors for backward, `saved` and `inverse_std`, are the normalized rows of a LayerNorm and
    the reciprocals of the rows' standard deviations. For a GELU, `saved` is the normal distribution
    function of x, and for a softmax the probabilities. In other cases, these tensors are unused.
    """
    out = x
    saved = x
    inverse_std = 1.0
    if PRODUCER == "norm":
        inverse_length = tl.div_rn(1.0, 1.0 * length)
        mean = (tl.sum(x, 1) * inverse_length)[:, None]
        centered = tl.where((column < length)[None, :], x - mean, 0.0)
        inverse_std = tl.rsqrt(tl.sum(centered * centered, 1) * inverse_length + eps)[:, None]
        saved = centered * inverse_std
        out = _add_optional(saved if weight is None else saved * weight, bias)
    if PRODUCER == "gelu":
        saved = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        out = x * saved
    if PRODUCER == "scores":
        scores = tl.where((column < length)[None, :], x, float("-inf"))
        power = tl.exp(scores - tl.max(scores, 1)[:, None])
        saved = power * tl.div_rn(1.0, tl.sum(power, 1))[:, None]
        return saved, saved, inverse_std
    return out.to(DTYPE).to(tl.float32), saved, inverse_std


@triton.jit
def _produce_backward(  # noqa: PLR0913
    grad: tensor,
    x: tensor,
    saved: tensor,
    inverse_std: tensor,
    weight: tensor,
    length: tensor,
    factor: tensor,
    PRODUCER: constexpr,
) -> tensor:
    """Gradient of x, or of the unscaled scores, from the gradient of the result of `_produce`."""
    if PRODUCER == "norm":
        grad = grad if weight is None else grad * weight
        inverse_length = tl.div_rn(1.0, 1.0 * length)
        mean = (tl.sum(grad, 1) * inverse_length)[:, None]
        projection = (tl.sum(grad * saved, 1) * inverse_length)[:, None]
        grad = (grad - mean - saved * projection) * inverse_std
    if PRODUCER == "gelu":
        grad = grad * (saved + x * DENSITY * tl.exp(-0.5 * x * x))
    if PRODUCER == "scores":
        grad = (grad - tl.sum(grad * saved, 1)[:, None]) * saved * factor
    return grad


@triton.jit
def _lsq_gradients(
    grad: tensor, u: tensor, low: tensor, high: tensor, HALF: constexpr
) -> tuple[tensor, tensor, tensor]:
    """Gradient of the input, terms of the gradient of the step size, and codes, for u = x / step.

    The terms are 0 where `grad` is 0, so padding adds nothing to their sum.
    """
    clamped = _clamp(u, low, high)
    is_out = u > high if low is None else (u < low) | (u > high)
    grad_x = tl.where(is_out, 0.0, grad)
    codes = _nearest_code(clamped, high, HALF)
    return grad_x, grad * codes - grad_x * clamped, codes


@triton.jit
def _store_column_sums(
    sums: tensor, tile: tensor, column: tensor, length: tensor, row: tensor
) -> None:
    """Write the sums of the columns of a tile to a row of `sums`."""
    tl.store(sums + row.to(tl.int64) * length + column, tl.sum(tile, 0), mask=column < length)


@triton.jit
def _store_requested_sums(
    sums: tensor, tiles: tensor, column: tensor, length: tensor, REQUESTED: constexpr
) -> None:
    """Write the column sums of the REQUESTED tiles; `sums` has a row per such tile and strip."""
    row = tl.program_id(0)
    for i in tl.static_range(4):
        if REQUESTED[i]:
            _store_column_sums(sums, tiles[i], column, length, row)
            row += tl.num_programs(0)


@triton.jit(do_not_specialize=["rows", "steps"])
def lsq_forward(  # noqa: PLR0913  (a kernel gets all addresses and strides)
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
    """`reference.lsq_forward` of rows, see `Layout`; before, after and sign may be None."""
    low, high = _bounds(low, high, sign)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = _is_inside(row, column, rows, length)
    step = (
        _step_size(scale, column, column < length)[None, :]
        if BY_COLUMN
        else _step_size(scale, row % steps, row < rows)[:, None]
    )
    shifted = _read(x, _offsets(row, column, stride), inside)
    if before is not None:
        shifted += _columns(before, column, length)
    clamped = _clamp(_quotient(shifted, step), low, high)
    dequantized = _nearest_code(clamped, high, HALF) * step
    if after is not None:
        dequantized += _columns(after, column, length)
    tl.store(y + _offsets(row, column, length), dequantized, mask=inside)


@triton.jit(do_not_specialize=["rows", "steps", "strip"])
def lsq_backward(  # noqa: PLR0913
    grad: tensor,
    x: tensor,
    grad_x: tensor,
    scale: tensor,
    before: tensor,
    after: tensor,
    sign: tensor,
    y: tensor,
    step_grads: tensor,
    sums: tensor,
    weight: tensor,
    bias: tensor,
    low: tensor,
    high: tensor,
    rows: tensor,
    length: tensor,
    grad_stride: tensor,
    x_stride: tensor,
    grad_x_stride: tensor,
    steps: tensor,
    strip: tensor,
    eps: tensor,
    factor: tensor,
    UNIT: constexpr,
    REQUESTED: constexpr,
    PRODUCER: constexpr,
    HALF: constexpr,
    BY_COLUMN: constexpr,
    BLOCK_R: constexpr,
    BLOCK_C: constexpr,
) -> None:
    """`reference.lsq_backward`; a program processes `strip` rows, a multiple of BLOCK_R.

    Gradients of the step sizes are written to `step_grads`: one term per row and per program along
    the columns, or (strips, length) if there is a step size per column. The REQUESTED sums of
    columns are written to `sums`, (number of requests, strips, length): for the offset before, the
    offset after, and the weight and the bias of a LayerNorm. The result of the forward pass is
    written to `y` unless `y` is None.

    PRODUCER is the operation that computed the input of the quantizer from `x`: "norm" = LayerNorm
    and "scores" = softmax, both with whole rows in a tile; "gelu" = GELU; "" = none. `grad_x` is
    the gradient of `x`, or with "scores", of the scores before they were multiplied by `factor`.

    Length and strides of rows are in UNITs, so that the compiler knows them to be multiples of
    UNIT. Triton detects multiples of 16 by itself, but 8 elements of half precision are already the
    16 bytes that one instruction reads.
    """
    low, high = _bounds(low, high, sign)
    length = length * UNIT
    grad_stride = grad_stride * UNIT
    x_stride = x_stride * UNIT
    grad_x_stride = grad_x_stride * UNIT
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Load these before the loop: inside the loop, the program would wait for each load.
    offset_before = None if before is None else _columns(before, column, length)
    offset_after = None if after is None else _columns(after, column, length)
    weights = None if weight is None else _columns(weight, column, length)
    biases = None if bias is None else _columns(bias, column, length)
    column_step = _step_size(scale, column, (column < length) & BY_COLUMN)[None, :]
    zero = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_step_grads = zero
    sum_before = zero
    sum_after = zero
    sum_weight = zero
    for first in range(0, strip, BLOCK_R):
        row = tl.program_id(0) * strip + first + tl.arange(0, BLOCK_R)
        inside = _is_inside(row, column, rows, length)
        step = column_step if BY_COLUMN else _step_size(scale, row % steps, row < rows)[:, None]
        grad_tile = _read(grad, _offsets(row, column, grad_stride), inside)
        x_tile = _read(x, _offsets(row, column, x_stride), inside)
        produced, saved, inverse_std = _produce(
            x_tile, weights, biases, column, length, eps, PRODUCER, x.dtype.element_ty
        )
        u = _quotient(_add_optional(produced, offset_before), step)
        grad_produced, step_grad, codes = _lsq_gradients(grad_tile, u, low, high, HALF)
        sum_before = sum_before + grad_produced
        sum_after = sum_after + grad_tile
        sum_weight = sum_weight + grad_produced * saved
        grad_x_tile = _produce_backward(
            grad_produced, x_tile, saved, inverse_std, weights, length, factor, PRODUCER
        )
        tl.store(grad_x + _offsets(row, column, grad_x_stride), grad_x_tile, mask=inside)
        if y is not None:
            dequantized = _add_optional(codes * step, offset_after)
            tl.store(y + _offsets(row, column, length), dequantized, mask=inside)
        if BY_COLUMN:
            sum_step_grads += step_grad
        else:
            offsets = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
            tl.store(step_grads + offsets, tl.sum(step_grad, 1), mask=row < rows)
    if BY_COLUMN:
        _store_column_sums(step_grads, sum_step_grads, column, length, tl.program_id(0))
    # The gradient of a LayerNorm's bias equals the gradient of an offset before the quantizer.
    tiles = (sum_before, sum_after, sum_weight, sum_before)
    _store_requested_sums(sums, tiles, column, length, REQUESTED)


@triton.jit(do_not_specialize=["n"])
def step_and_slope(
    step: tensor,
    slope: tensor,
    start: tensor,
    growth: tensor,
    change: tensor,
    n: tensor,
    min_reliable: tensor,
    BLOCK: constexpr,
) -> None:
    """`step_and_slope` of `qat.functional.lsq`, for n elements."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    s = tl.load(start + i, mask=inside)
    t = tl.load(change + i, mask=inside)
    scaled_start = s * tl.load(growth + i, mask=inside)
    shortfall = tl.where(s < min_reliable, min_reliable, s) - s
    positive_change = tl.where(t < 0.0, 0.0, t)
    is_positive = tl.where(t > 0.0, 1.0, tl.where(t == t, 0.0, t))  # NaN stays NaN
    tl.store(step + i, scaled_start + shortfall * positive_change, mask=inside)
    tl.store(slope + i, scaled_start + shortfall * is_positive, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def statsq_forward(  # noqa: PLR0913
    w: tensor,
    y: tensor,
    scale: tensor,
    n: tensor,
    rows: tensor,
    length: tensor,
    COMPUTE_SCALE: constexpr,
    BLOCK_R: constexpr,
    BLOCK_C: constexpr,
) -> None:
    """`reference.statsq_forward`; n = 2^(bits-1). COMPUTE_SCALE = compute and write `scale`."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if COMPUTE_SCALE:
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for first in range(0, length, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            inside = _is_inside(row, column, rows, length)
            total += tl.abs(_read(w, _offsets(row, column, length), inside))
        s = 2.0 * tl.div_rn(tl.sum(total, 1), 1.0 * length)
        tl.store(scale + row, s, mask=row < rows)
    else:
        s = tl.load(scale + row, mask=row < rows, other=1.0).to(tl.float32)
    s = s[:, None]
    for first in range(0, length, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        inside = _is_inside(row, column, rows, length)
        offsets = _offsets(row, column, length)
        quotient = tl.div_rn(_read(w, offsets, inside), tl.where(s < TINY, TINY, s))
        u = _clamp(quotient, -1.0, TOP_CLIP)
        tl.store(y + offsets, tl.div_rn(_round(u * n - 0.5) + 0.5, n) * s, mask=inside)
