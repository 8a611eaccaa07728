"""Kurtosis of weights, and KURE, a regularizer that pulls the kurtosis to a target.

Source: Shkolnik et al., arXiv 2002.07686; the unbiased standard deviation follows the paper's code.
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
# Maximum number of values for which float64 costs no extra time. The rounding errors of so few
# float32 values would not average out.
MAX_FLOAT64_VALUES = 2**14


def _kurtosis_dtype(w: Tensor) -> torch.dtype:
    if w.dtype == torch.float64:
        return torch.float64
    # MPS has no float64.
    if w.numel() <= MAX_FLOAT64_VALUES and w.device.type != "mps":
        return torch.float64
    return torch.float32


def kurtosis(w: Tensor) -> Tensor:
    """Mean of ((w - mean w) / std w)^4 over all elements, where std divides by n - 1.

    With many elements, the kurtosis of a uniform distribution is 1.8, of a normal one 3, and of a
    Laplace distribution 6.

    Args:
        w: any shape and float dtype. The kurtosis is computed in float64 if `w` is float64 or has
            few values (except on MPS), else in float32. Autocast does not change this.

    Returns:
        Scalar, float64 if `w` is float64, else float32. For a constant tensor or a single element,
        0 with a gradient of 0.
    """
    values = w.to(_kurtosis_dtype(w))
    low, high = values.detach().aminmax()
    # The deviations of a constant tensor are rounding errors, but its range is exactly zero. Ranges
    # below `tiny`, whose inverse may overflow, count as zero. The comparison is false for NaN, so
    # NaN stays NaN.
    width = high - low
    is_constant = width < torch.finfo(values.dtype).tiny
    inverse_width = torch.where(is_constant, 0.0, 1 / width)
    # Kurtosis does not depend on the scale: deviations below 1 keep fourth powers inside float32.
    deviation = (values - values.mean()) * inverse_width
    # The mean has a rounding error, which is large for weights far from zero, so subtract the mean
    # again.
    squared_deviation = (deviation - deviation.mean()).square()
    variance = squared_deviation.sum() / max(w.numel() - 1, 1)
    variance = torch.where(variance == 0, 1.0, variance)
    result = squared_deviation.square().mean() / variance.square()
    return result.to(torch.promote_types(w.dtype, torch.float32))


def kurtoses(weights: Iterable[Tensor]) -> Tensor:
    """`kurtosis` of each of L tensors, (L,).

    Raises:
        ValueError: `weights` is empty.
    """
    tensors = tuple(weights)
    if not tensors:
        raise ValueError("kurtoses: there are no weights")
    return torch.stack([kurtosis(w) for w in tensors])


def kure_from_kurtoses(
    values: Tensor, target: float = UNIFORM_KURTOSIS, reduction: str = "mean"
) -> Tensor:
    """`kure_loss`, computed from kurtoses (L,).

    Raises:
        UsageError: `target` or `reduction` is not allowed.
    """
    check_kure("target", target, "reduction", reduction)
    return _REDUCTIONS[reduction]((values - target).square())


def kure_loss(
    weights: Iterable[Tensor], target: float = UNIFORM_KURTOSIS, reduction: str = "mean"
) -> Tensor:
    """(K - target)^2 for the kurtosis K of each tensor, reduced to a scalar.

    Args:
        weights: tensors of any shapes and float dtypes, or a single tensor.
        target: above 1; no distribution has a kurtosis below 1.
        reduction: `mean`, `sum` or `max` over the tensors.

    Raises:
        UsageError: `target` or `reduction` is not allowed.
        ValueError: `weights` is empty.
    """
    if isinstance(weights, Tensor):
        weights = [weights]
    return kure_from_kurtoses(kurtoses(weights), target, reduction)


def check_kure(
    target_setting: str, target: object, reduction_setting: str, reduction: object
) -> None:
    """Check the target and the reduction of KURE; messages name the settings, not the arguments.

    Raises:
        UsageError: the target is not a number above 1, or the reduction is not in `REDUCTIONS`.
    """
    check_number(target_setting, target, 1, exclusive_lowest=True)
    check_choice(reduction_setting, reduction, REDUCTIONS)
