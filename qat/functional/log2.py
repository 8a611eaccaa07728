"""Powers of two for softmax probabilities. Source: FQ-ViT (arXiv 2111.13824); the integer exponential is I-BERT's (arXiv 2101.01321)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.functional.ste import code_dtype, in_dtype
from qat.utils.validate import check_bits

# exp(p) is about 0.35815147 p^2 + 0.96963238 p + 1 for p in (-ln 2, 0].
_A, _B, _C = 0.35815147, 0.96963238, 1.0
_LN2 = 0.6931
# Binary places of the integer exponential.
_PLACES = 30
# From sqrt(C / A) = 1.67 on the integer exponential of 0 would be 0.
_COARSE = 1.6


def _exponent(x: Tensor) -> Tensor:
    """The whole number e with 2^-e next to x on a logarithmic scale; inf for an exact zero."""
    return -x.float().log2().round()


def _power(exponent: Tensor, bits: int) -> Tensor:
    """2^-e, zero from e = 2^bits on; negative exponents count as 0."""
    return torch.where(exponent >= 2**bits, 0.0, torch.exp2(-exponent.clamp(0, 2**bits - 1)))


class _Log2(torch.autograd.Function):
    """Straight through the rounding of the logarithm: the gradient is out / x between the outermost codes, else zero."""

    @staticmethod
    def forward(x: Tensor, bits: int) -> Tensor:
        return in_dtype(_power(_exponent(x), bits), x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.bits = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        exponent = _exponent(x)
        inside = (exponent >= 0) & (exponent < 2**ctx.bits)
        return torch.where(inside, grad.float() * torch.exp2(-exponent) / x.float(), 0.0).to(
            x.dtype
        ), None


def fake_quantize_log2(x: Tensor, bits: int) -> Tensor:
    """2^-k with k = round(-log2 x), half to even; 1 for k < 0, 0 for k >= 2^bits.

    Args:
        x: any shape and float dtype, no negative values; computed in float32.
        bits: 2 to 8.

    Returns:
        The shape and dtype of `x`. An exact zero stays zero. The gradient passes through the rounding: out / x, or zero where k is no
        code.
    """
    check_bits("bits", bits)
    return (
        _Log2.apply(x, bits) if torch.is_grad_enabled() else _power(_exponent(x), bits).to(x.dtype)
    )


def log2_codes(x: Tensor, bits: int) -> Tensor:
    """Integer codes min(max(k, 0), 2^bits - 1) of `fake_quantize_log2`; the last one stands for its own power and for all zeros."""
    check_bits("bits", bits)
    return _exponent(x.detach()).clamp(0, 2**bits - 1).to(code_dtype(0, 2**bits - 1))


def _integer_exp(x: Tensor, scale: Tensor) -> Tensor:
    """An integer proportional to exp(x * scale), for x <= 0 in steps: a shift by whole ln 2 and a polynomial for the rest."""
    ln2 = (-_LN2 / scale).floor()
    x = torch.maximum(x, _PLACES * ln2)
    shift = (x / ln2).floor()
    rest = x - ln2 * shift
    polynomial = rest * (rest + (_B / _A / scale).floor()) + (_C / _A / scale.square()).floor()
    return (polynomial * torch.exp2(_PLACES - shift)).floor().clamp(min=0)


@torch.no_grad()
def log_int_softmax(x: Tensor, scale: Tensor, bits: int = 4) -> Tensor:
    """Softmax over the last dimension in integer arithmetic, each probability a power of two (log-int-softmax).

    With e the integer exponential of x / scale - max, r = round(sum e / e) and 2^k the power of two next to r (from 1.5 powers on the
    next): the result is 2^-k, zero from k = 2^bits on. No gradient.

    Args:
        x: (..., N) scores, multiples of `scale`.
        scale: one element, the step of the scores; one above 1.6 is divided by the power of two that brings it to 1/128 to 1/64.
        bits: 2 to 8.

    Returns:
        The shape and dtype of `x`; rows need not add up to 1.
    """
    check_bits("bits", bits)
    scale = scale.float()
    scale = torch.where(scale > _COARSE, scale / torch.exp2(scale.log2().ceil() + 6), scale)
    steps = x.float() / scale
    e = _integer_exp(steps - steps.amax(-1, keepdim=True), scale)
    ratio = (e.sum(-1, keepdim=True) / e).round()
    floor = ratio.log2().floor()
    exponent = torch.where(ratio >= 1.5 * torch.exp2(floor), floor + 1, floor)
    return _power(exponent, bits).to(x.dtype)
