"""The frozen form of a quantizer: what its grid says, and the codes of its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.bias_correction import correct_mean_and_std
from qat.model.frozen.quantizers import FrozenActivation, FrozenNonuniform, FrozenWeight
from qat.model.sites import Site
from qat.quantizers import Quantizer, UniformGrid


def frozen_form(site: Site) -> Quantizer:
    """What takes the place of a site's quantizer: no parameters, nothing of the float master; float stays as it is.

    Raises:
        UsageError: the quantizer has no fixed grid.
    """
    quantizer = site.quantizer
    if quantizer.is_float:
        return quantizer
    weight = site.latent().detach() if site.is_weight else None
    grid = quantizer.grid(weight)
    if isinstance(grid, UniformGrid):
        return FrozenActivation(quantizer.spec, site.name, grid) if weight is None else _weight(site, grid, weight)
    if grid is None or weight is not None or grid.before is not None:
        why = f"{site.name} is quantized by {quantizer.spec.quantizer}, whose values have no fixed grid"
        raise UsageError(f"freeze: {why}; must be statsq for weights, lsq, minmax, affine, log2, float or a class with the method grid")
    return FrozenNonuniform(quantizer, site.name)


def _weight(site: Site, grid: UniformGrid, weight: Tensor) -> FrozenWeight:
    codes = site.quantizer.codes(weight).to(torch.int8 if grid.qmin < 0 else torch.uint8)
    shift = torch.zeros_like(grid.step) - grid.zero_point
    parts: tuple[Tensor, Tensor, Tensor, Tensor | None] = (codes, grid.step.clone(), shift, None)
    axis = grid.axis
    if grid.after is not None:
        axis = axis or 0
        n = weight.shape[axis]
        parts = (codes, grid.step.expand(n).clone(), shift.expand(n).clone(), _of_rows(grid.after, weight, axis, site.name))
    made = FrozenWeight(site.quantizer.spec, axis, site.name, parts)
    return _corrected(made, weight) if site.quantizer.spec.bias_correction else made


def _of_rows(after: Tensor, weight: Tensor, axis: int, name: str) -> Tensor:
    """(n,): the offset behind each row.

    Raises:
        UsageError: it differs within a row.
    """
    rows = after.detach().float().expand_as(weight).movedim(axis, 0).flatten(1)
    if (rows != rows[:, :1]).any():
        raise UsageError(f"freeze: {name} has an offset behind its quantizer that differs within a row; must be one for each row")
    return rows[:, 0].clone()


def _corrected(made: FrozenWeight, weight: Tensor) -> FrozenWeight:
    """Bias correction is an affine map of every row: its factor goes into the scale, which all rows have then."""
    axis = made.axis or 0
    plain = made()
    after = correct_mean_and_std(plain, weight, axis)
    rows, corrected = (t.movedim(axis, 0).flatten(1) for t in (plain, after))
    spread = (rows - rows.mean(1, keepdim=True)).square().sum(1)
    ratio = torch.where(
        spread > 0, ((corrected - corrected.mean(1, keepdim=True)) * (rows - rows.mean(1, keepdim=True))).sum(1) / spread, 1.0
    )
    n = len(rows)
    parts = (made.stored, made.scale.expand(n) * ratio, made.shift.expand(n).clone(), corrected.mean(1) - ratio * rows.mean(1))
    return FrozenWeight(made.spec, axis, made.name, parts)
