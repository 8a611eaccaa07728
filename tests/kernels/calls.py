"""LSQ by `operators`, or by the kernels of `cpu` or `gpu`, with keyword arguments."""

import functools

import torch

from qat.functional.lsq import LsqGradients
from qat.kernels import LSQParams, Producer, gpu, operators, reference

ITSELF = Producer()


def lsq_forward(
    x, scale, before, after, codes, *, sign=None, dtype=torch.float32, module=operators
):
    return module.lsq_forward(x, scale, before, after, sign, *codes, dtype)


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
    module=operators,
):
    """The gradients, that of the scale without LSQ's factor; None where a kernel does not fit."""
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    q = LSQParams(scale, before, after, sign, codes)
    with_after = after is not None
    if module is operators:
        results = operators.lsq_backward(
            grad, x, *q[:4], *codes, with_after, out, dequantized, *norm, *producer
        )
    else:
        results = module.lsq_backward(
            grad, x, q, out, dequantized, *norm, producer, with_after=with_after
        )
    if results is None:
        return None
    grad_scale, sums, y = results
    grad_before, grad_after, *norm_grads = operators.split_sums(sums, before, after, *norm)
    y = None if dequantized is None else y
    return LsqGradients(out, grad_scale, grad_before, grad_after, y, *norm_grads)


gpu_forward = functools.partial(lsq_forward, module=gpu)
gpu_backward = functools.partial(lsq_backward, module=gpu)


def softmax_reference(grad, probs, scale, codes, factor):
    """Gradients of the scores and of the scale, by the formulas."""
    inner, grad_scale, *_ = reference.lsq_backward(grad, probs, scale, None, codes)
    grad_scores = torch.ops.aten._softmax_backward_data(inner, probs.float(), -1, torch.float32)
    return grad_scores * factor, grad_scale
