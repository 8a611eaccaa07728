"""The operators and the kernels of a device with keywords, as tests call them."""

import torch

from qat.functional.lsq import LsqGradients
from qat.kernels import LSQParams, Made, gpu, operators, reference

ITSELF = Made()


def lsq_forward(x, scale, before, after, codes, *, sign=None, dtype=torch.float32):
    return operators.lsq_forward(x, scale, before, after, sign, *codes, dtype)


def lsq_backward(
    grad,
    x,
    scale,
    before,
    codes,
    *,
    sign=None,
    after=None,
    out=None,
    dequantized=None,
    norm=(None, None),
    producer=ITSELF,
):
    """The gradient of `x` and what the operator gives, that of the scale without LSQ's factor."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    with_after = after is not None
    q = LSQParams(scale, before, after, sign, codes)
    found = operators.lsq_backward(
        grad, x, *q[:4], *codes, with_after, out, dequantized, *norm, *producer
    )
    return _named(found, q, with_after, out, norm, dequantized)


def _named(found, q, with_after, out, norm, dequantized):
    of_scale, sums, y = found
    before, after, *of_norm = operators.split(
        sums, q.before, q.after if with_after else None, *norm
    )
    return LsqGradients(out, of_scale, before, after, None if dequantized is None else y, *of_norm)


def softmax_backward(grad, probs, scale, codes, factor):
    """Gradients of scores, `factor` times which a softmax made into `probs`, and of the scale; the quantized probabilities."""
    found = lsq_backward(
        grad, probs, scale, None, codes, dequantized=torch.float32, producer=Made("softmax", factor)
    )
    return found.x, found.scale, found.dequantized


def softmax_reference(grad, probs, scale, codes, factor):
    """The first two of `softmax_backward`."""
    inner, of_scale, *_ = reference.lsq_backward(grad, probs, scale, None, codes)
    return torch.ops.aten._softmax_backward_data(
        inner, probs.float(), -1, torch.float32
    ) * factor, of_scale


def gpu_forward(x, scale, before, after, codes, *, sign=None, dtype=torch.float32):
    return gpu.lsq_forward(x, scale, before, after, sign, *codes, dtype)


def gpu_backward(
    grad,
    x,
    scale,
    before,
    codes,
    *,
    sign=None,
    after=None,
    out=None,
    dequantized=None,
    norm=(None, None),
    producer=ITSELF,
):
    """The gradient of `x` and what the kernel gives; None where it does not fit."""
    out = x.new_empty(x.shape) if out is None else out
    q = LSQParams(scale, before, after, sign, codes)
    found = gpu.lsq_backward(
        grad, x, q, out, dequantized, *norm, producer, with_after=after is not None
    )
    return None if found is None else _named(found, q, after is not None, out, norm, dequantized)
