"""Powers of two for softmax probabilities.

Sources: FQ-ViT (arXiv 2111.13824); the integer exponential is I-BERT's (arXiv 2101.01321).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.functional.ste import code_dtype, in_dtype
from qat.utils.validate import check_bits

# exp(p) is about _A p^2 + _B p + _C for p in (-ln 2, 0].
_A = 0.35815147
_B = 0.96963238
_C = 1.0
_LN2 = 0.6931
# Binary places of the integer exponential.
_PLACES = 30
# Maximum scale of scores; above sqrt(_C / _A) = 1.67, the integer exponential of 0 would be 0.
_MAX_SCALE = 1.6


def _exponent(x: Tensor) -> Tensor:
    """The integer e with 2^-e nearest to x on a logarithmic scale; inf for x = 0."""
    return -x.float().log2().round()


def _power(exponent: Tensor, bits: int) -> Tensor:
    """2^-e for 0 <= e < 2^bits, 1 for smaller e and 0 for larger e."""
    power = torch.exp2(-exponent.clamp(0, 2**bits - 1))
    return torch.where(exponent >= 2**bits, 0.0, power)


class _Log2(torch.autograd.Function):
    """`fake_quantize_log2`; the gradient passes straight through the rounding of the logarithm."""

    @staticmethod
    def forward(x: Tensor, bits: int) -> Tensor:
        return in_dtype(_power(_exponent(x), bits), x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, bits = inputs
        ctx.bits = bits
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        exponent = _exponent(x)
        is_inside = (exponent >= 0) & (exponent < 2**ctx.bits)
        power = torch.exp2(-exponent)
        grad_x = torch.where(is_inside, grad.float() * power / x.float(), 0.0)
        return grad_x.to(x.dtype), None


def fake_quantize_log2(x: Tensor, bits: int) -> Tensor:
    """Fake-quantize to 2^-k with k = round(-log2 x); to 1 for k < 0, and to 0 for k >= 2^bits.

    Args:
        x: any shape and float dtype, no negative values; computed in float32.
        bits: 2 to 8.

    Returns:
        The shape and dtype of `x`. Zero stays zero. The gradient passes straight through the
        rounding of k: it is out / x, or zero where k is not in [0, 2^bits - 1].
    """
    check_bits("bits", bits)
    if torch.is_grad_enabled():
        return _Log2.apply(x, bits)
    return _power(_exponent(x), bits).to(x.dtype)


def log2_codes(x: Tensor, bits: int) -> Tensor:
    """Integer codes min(max(k, 0), 2^bits - 1) of `fake_quantize_log2`.

    The last code means both 2^-(2^bits - 1) and zero.

    Returns:
        Codes in the shape of `x`, int8 up to 7 bits, int16 for 8 bits.
    """
    check_bits("bits", bits)
    qmax = 2**bits - 1
    codes = _exponent(x.detach()).clamp(0, qmax)
    return codes.to(code_dtype(0, qmax))


def _integer_exp(x: Tensor, scale: Tensor) -> Tensor:
    """An integer proportional to exp(x * scale), for integers x <= 0.

    exp(x * scale) is 2^-shift times the exponential of a remainder; a polynomial approximates this
    exponential.
    """
    minus_ln2 = (-_LN2 / scale).floor()  # in units of `scale`
    x = torch.maximum(x, _PLACES * minus_ln2)
    shift = (x / minus_ln2).floor()
    remainder = x - minus_ln2 * shift
    linear_term = (_B / _A / scale).floor()
    constant_term = (_C / _A / scale.square()).floor()
    polynomial = remainder * (remainder + linear_term) + constant_term
    return (polynomial * torch.exp2(_PLACES - shift)).floor().clamp(min=0)


@torch.no_grad()
def log_int_softmax(x: Tensor, scale: Tensor, bits: int = 4) -> Tensor:
    """Log-int-softmax: softmax in integer arithmetic over the last dimension, as powers of two.

    Let e be the integer exponential of x - max x, and r = round(sum e / e). The result is
    2^-k, where 2^k is the power of two nearest to r (the larger of two equally near powers). For
    k >= 2^bits, the result is zero. There is no gradient.

    Args:
        x: (..., N) scores, multiples of `scale`.
        scale: one element, the step size of the scores. A step size above 1.6 is divided by the
            power of two that brings it between 1/128 and 1/64.
        bits: 2 to 8.

    Returns:
        The shape and dtype of `x`; rows need not add up to 1.
    """
    check_bits("bits", bits)
    scale = scale.float()
    power = torch.exp2(scale.log2().ceil() + 6)
    scale = torch.where(scale > _MAX_SCALE, scale / power, scale)
    scores_in_steps = x.float() / scale
    row_max = scores_in_steps.amax(-1, keepdim=True)
    exponentials = _integer_exp(scores_in_steps - row_max, scale)
    total = exponentials.sum(-1, keepdim=True)
    ratio = (total / exponentials).round()
    floor_exponent = ratio.log2().floor()
    is_nearer_to_next = ratio >= 1.5 * torch.exp2(floor_exponent)
    exponent = torch.where(is_nearer_to_next, floor_exponent + 1, floor_exponent)
    return _power(exponent, bits).to(x.dtype)
