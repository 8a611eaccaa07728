"""The operators and the kernels of a device with keywords, as tests call them."""

import torch

from qat.kernels import Steps, gpu, operators


def lsq_forward(x, scale, before, after, codes, *, sign=None, dtype=torch.float32):
    return operators.lsq_forward(x, scale, before, after, sign, *codes, dtype)


def lsq_backward(grad, x, scale, before, codes, *, sign=None, after=None, **how):
    return operators.lsq_gradients(grad, x, Steps(scale, before, after, sign, codes), **how)


def probs_backward(grad, probs, scale, codes, factor):
    out = torch.empty_like(probs)
    return out, *operators.probs_backward(grad, probs, scale, *codes, factor, out, torch.float32)


def gpu_forward(x, scale, before, after, codes, *, sign=None, dtype=torch.float32):
    return gpu.lsq_forward(x, Steps(scale, before, after, sign, codes), dtype)


def gpu_backward(grad, x, scale, before, codes, *, sign=None, after=None, after_shape=None, out=None, dequantized=None, **through):
    """The gradient of `x` and what the kernel gives; None where it does not fit."""
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    found = gpu.lsq_backward(grad, x, Steps(scale, before, after, sign, codes), after_shape, out, dequantized, **through)
    return None if found is None else operators.LsqGradients(out, *found)
