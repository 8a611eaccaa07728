"""Kurtosis of weights, and KURE, which pulls it to a target. Source: Shkolnik et al., arXiv 2002.07686; its code has the unbiased std."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.spec import check_choice, check_number

UNIFORM_KURTOSIS = 1.8
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum, "max": torch.max}
REDUCTIONS = tuple(_REDUCTIONS)
# On a CPU what is made of a piece of this many values stays in its cache; elsewhere, and compiled, a tensor is one piece.
PIECE = 2**17


# Up to so many values float64 costs nothing, and the rounding errors of single values do not cancel out.
FEW = 2**14


def _dtype_for(w: Tensor) -> torch.dtype:
    """What is computed in."""
    is_wide = w.dtype == torch.float64 or (w.numel() <= FEW and w.device.type != "mps")
    return torch.float64 if is_wide else torch.float32


def _pieces(w: Tensor) -> tuple[Tensor, ...]:
    if w.device.type != "cpu" or w.numel() <= PIECE or torch.compiler.is_compiling():
        return (w,)
    return w.reshape(-1).split(PIECE)


def _power_sums(w: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """(4,): sums of z, z^2, z^3, z^4. `sum` adds pairwise: a dot product of two million numbers is off by 1e-4."""
    z = (w - mean) * inverse
    square = z * z
    return torch.stack([z.sum(), square.sum(), (square * z).sum(), (square * square).sum()])


def _sums(w: Tensor) -> Tensor:
    """(6,): mean m, 1/range r, and the sums of z, z^2, z^3, z^4 with z = (w - m) / r.

    Values up to 1 keep fourth powers of small and of large weights inside float32. The range of a constant tensor is exactly zero; its
    spread would be a rounding error.
    """
    w = w.to(_dtype_for(w))
    mean, (low, high) = w.mean(), w.aminmax()
    width = high - low
    # Not `width > 0`: a NaN has to stay.
    inverse = torch.where(width < torch.finfo(w.dtype).tiny, torch.zeros_like(width), 1 / width)
    powers = torch.stack([_power_sums(piece, mean, inverse) for piece in _pieces(w)]).sum(0)
    return torch.cat([torch.stack([mean, inverse]), powers])


def _kurtosis_and_cubic(sums: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Kurtoses (L,), and the cubics in z that their gradients are: (L, 4), constant term first.

    With d = z - mean z: K = S4 (n-1)^2 / (n S2^2) and dK/dw = 4/r ((n-1)^2 / (n S2^2) (d^3 - S3/n) - K d / S2), S_k the sum of d^k.

    Args:
        sums: (L, 6) of `_sums`.
        n: (L,) elements of each tensor.
    """
    _, inverse, s1, s2, s3, s4 = sums.unbind(1)
    # The mean is off by a rounding error, which is large where it is large against the spread: moments are moved to the mean of z.
    shift = s1 / n
    about2 = s2 - n * shift**2
    about3 = s3 - 3 * shift * s2 + 2 * n * shift**3
    about4 = s4 - 4 * shift * s3 + 6 * shift**2 * s2 - 3 * n * shift**4
    about2 = torch.where(about2 == 0, torch.ones_like(about2), about2)
    third = ((n - 1) / about2) ** 2 / n
    kurtosis = about4 * third
    cubic, linear = 4 * inverse * third, -4 * inverse * kurtosis / about2
    constant = -cubic * about3 / n
    terms = [
        constant - linear * shift - cubic * shift**3,
        linear + 3 * cubic * shift**2,
        -3 * cubic * shift,
        cubic,
    ]
    return kurtosis, torch.stack(terms, dim=1)


class _Kurtoses(torch.autograd.Function):
    """Keeps the weights themselves and six numbers of each for the backward pass, which reads a weight once."""

    @staticmethod
    def forward(*weights: Tensor) -> tuple[Tensor, Tensor]:
        widest = functools.reduce(torch.promote_types, map(_dtype_for, weights))
        sums = torch.stack([_sums(w).to(widest) for w in weights])
        n = torch.stack([sums.new_full((), w.numel()) for w in weights])  # numbers copied from a list would wait for the device
        kurtoses, cubics = _kurtosis_and_cubic(sums, n)
        own = functools.reduce(torch.promote_types, [w.dtype for w in weights], torch.float32)
        return kurtoses.to(own), torch.cat([sums[:, :2], cubics], dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        numbers, *weights = ctx.saved_tensors
        places, cubics = numbers[:, :2].unbind(0), (numbers[:, 2:] * grad.unsqueeze(1)).unbind(0)
        needed = zip(weights, places, cubics, ctx.needs_input_grad, strict=True)
        return tuple(_gradient(w, place, cubic) if need else None for w, place, cubic, need in needed)


def _gradient(w: Tensor, place: Tensor, cubic: Tensor) -> Tensor:
    """The cubic of every entry of `w`."""
    dtype = _dtype_for(w)
    pieces = [_cubic_of(piece.to(dtype), place.unbind(0), cubic.unbind(0)).to(w.dtype) for piece in _pieces(w)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces).view_as(w)


def _cubic_of(w: Tensor, place: tuple[Tensor, ...], terms: tuple[Tensor, ...]) -> Tensor:
    mean, inverse = place
    constant, linear, square, cube = terms
    z = (w - mean).mul_(inverse)
    return (z * cube).add_(square).mul_(z).add_(linear).mul_(z).add_(constant)


def kurtoses(weights: Iterable[Tensor]) -> Tensor:
    """`kurtosis` of several tensors: (L,), in one node of the graph.

    Raises:
        ValueError: there are none.
    """
    tensors = tuple(weights)
    if not tensors:
        raise ValueError("kurtoses: there are no weights")
    return _Kurtoses.apply(*tensors)[0]


def kurtosis(w: Tensor) -> Tensor:
    """Mean of ((w - mean w) / std w)^4 over all elements, std with n - 1: 1.8 uniform, 3 normal, 6 Laplace for many elements.

    Args:
        w: any shape and float dtype; computed in float32 (float64 for float64 and for few values) whatever autocast says.

    Returns:
        Scalar. 0 with a gradient of 0 for a constant tensor, and for a single element. It can be differentiated once.
    """
    return kurtoses((w,))[0]


def kure_of(values: Tensor, target: float = UNIFORM_KURTOSIS, reduction: str = "mean") -> Tensor:
    """`kure_loss` of kurtoses (L,) that are known already."""
    check_kure("target", target, "reduction", reduction)
    return _REDUCTIONS[reduction]((values - target).square())


def kure_loss(weights: Iterable[Tensor], target: float = UNIFORM_KURTOSIS, reduction: str = "mean") -> Tensor:
    """(K_i - target)^2 of the kurtosis of each tensor, reduced to a scalar.

    Args:
        weights: any shapes and float dtypes.
        target: above 1, below which no distribution is.
        reduction: `mean`, `sum` or `max` over the tensors.

    Raises:
        UsageError: an argument that cannot work.
        ValueError: there are no weights.
    """
    return kure_of(kurtoses([weights] if isinstance(weights, Tensor) else weights), target, reduction)


def check_kure(target_setting: str, target: object, reduction_setting: str, reduction: object) -> None:
    """Raise `UsageError`, under the names of the settings, unless the target is a number above 1 and the reduction one of `REDUCTIONS`."""
    check_number(target_setting, target, 1, above=True)
    check_choice(reduction_setting, reduction, REDUCTIONS)
