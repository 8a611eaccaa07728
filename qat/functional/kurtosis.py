"""Kurtosis of weights, and KURE, which pulls it to a target.

Source: Shkolnik et al., arXiv 2002.07686; its code has the unbiased std.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from qat.utils.validate import check_choice, check_number

UNIFORM_KURTOSIS = 1.8
_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.max,
}
REDUCTIONS = tuple(_REDUCTIONS)
# Up to so many values float64 costs nothing, and the rounding errors of single values do not cancel out.
FEW = 2**14


def kurtosis(w: Tensor) -> Tensor:
    """Mean of ((w - mean w) / std w)^4 over all elements, std with n - 1: 1.8 uniform, 3 normal, 6 Laplace for many elements.

    Args:
        w: any shape and float dtype; computed in float32 (float64 for float64 and for few values) whatever autocast says.

    Returns:
        Scalar. 0 with a gradient of 0 for a constant tensor, and for a single element.
    """
    is_wide = w.dtype == torch.float64 or (w.numel() <= FEW and w.device.type != "mps")
    x = w.to(torch.float64 if is_wide else torch.float32)
    low, high = x.detach().aminmax()
    # A constant's deviations are rounding errors, its range is exactly zero. Not `high > low`: a NaN has to stay.
    inverse = torch.where(high - low < torch.finfo(x.dtype).tiny, 0.0, 1 / (high - low))
    # Kurtosis does not depend on the scale, so it is a constant here: deviations below 1 keep fourth powers inside float32.
    deviation = (x - x.mean()) * inverse
    # That mean is off by a rounding error, which is large where the weights lie far from zero.
    square = (deviation - deviation.mean()).square()
    variance = square.sum() / max(w.numel() - 1, 1)
    variance = torch.where(variance == 0, 1.0, variance)
    return (square.square().mean() / variance.square()).to(
        torch.promote_types(w.dtype, torch.float32)
    )


def kurtoses(weights: Iterable[Tensor]) -> Tensor:
    """`kurtosis` of several tensors: (L,).

    Raises:
        ValueError: there are none.
    """
    tensors = tuple(weights)
    if not tensors:
        raise ValueError("kurtoses: there are no weights")
    return torch.stack([kurtosis(w) for w in tensors])


def kure_of(values: Tensor, target: float = UNIFORM_KURTOSIS, reduction: str = "mean") -> Tensor:
    """`kure_loss` of kurtoses (L,) that are known already."""
    check_kure("target", target, "reduction", reduction)
    return _REDUCTIONS[reduction]((values - target).square())


def kure_loss(
    weights: Iterable[Tensor], target: float = UNIFORM_KURTOSIS, reduction: str = "mean"
) -> Tensor:
    """(K_i - target)^2 of the kurtosis of each tensor, reduced to a scalar.

    Args:
        weights: any shapes and float dtypes.
        target: above 1, below which no distribution is.
        reduction: `mean`, `sum` or `max` over the tensors.

    Raises:
        UsageError: an argument that cannot work.
        ValueError: there are no weights.
    """
    return kure_of(
        kurtoses([weights] if isinstance(weights, Tensor) else weights), target, reduction
    )


def check_kure(
    target_setting: str, target: object, reduction_setting: str, reduction: object
) -> None:
    """Raise `UsageError`, under the names of the settings, unless the target is a number above 1 and the reduction one of `REDUCTIONS`."""
    check_number(target_setting, target, 1, above=True)
    check_choice(reduction_setting, reduction, REDUCTIONS)
