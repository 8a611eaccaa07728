"""The frozen form of each quantizer."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.bias_correction import correct_mean_and_std
from qat.functional.lsq import SCALE_FLOOR
from qat.model.frozen.quantizers import FrozenActivation, FrozenLog2, FrozenWeight
from qat.model.sites import Site
from qat.quantizers import LSQ, Affine, AutoSignLSQ, DynamicMinMax, Float, Log2, MinMax, Quantizer, Shifted, StatsQ

KNOWN = (StatsQ, LSQ, AutoSignLSQ, Affine, MinMax, DynamicMinMax, Log2, Float)


def frozen_form(site: Site) -> Quantizer:
    """What takes the place of a site's quantizer: no parameters, nothing of the float master; float stays as it is.

    Raises:
        UsageError: the quantizer has no fixed grid.
    """
    inside = site.quantizer.quantizer if isinstance(site.quantizer, Shifted) else site.quantizer
    if type(inside) not in KNOWN:  # a subclass may round in another way
        raise _refusal(site)
    return _weight(site.quantizer, site, site.latent().detach()) if site.is_weight else _activation(site.quantizer, site)


@functools.singledispatch
def _weight(quantizer: Quantizer, site: Site, weight: Tensor) -> Quantizer:
    raise _refusal(site)


def _refusal(site: Site) -> UsageError:
    inside = site.quantizer.quantizer if isinstance(site.quantizer, Shifted) else site.quantizer
    why = f"{site.name} is quantized by {type(inside).__name__}, of which no frozen form is known"
    return UsageError(f"freeze: {why}; must be one of statsq for weights, lsq, minmax, affine, log2, float")


@_weight.register
def _(quantizer: Float, site: Site, weight: Tensor) -> Quantizer:
    return quantizer


@_weight.register
def _(quantizer: StatsQ, site: Site, weight: Tensor) -> Quantizer:
    step = (quantizer.scale_of(weight) / 2 ** (quantizer.spec.bits - 1)).flatten()
    return _codes(site, quantizer.codes(weight), quantizer.axis or 0, step, torch.full_like(step, 0.5))


@_weight.register
def _(quantizer: LSQ, site: Site, weight: Tensor) -> Quantizer:
    step = quantizer.scale.detach().float().clamp(min=SCALE_FLOOR)
    return _codes(site, quantizer.codes(weight), quantizer.axis, step, torch.zeros_like(step))


@_weight.register
def _(quantizer: DynamicMinMax, site: Site, weight: Tensor) -> Quantizer:
    step, zero_point = quantizer.grid_of(weight)
    return _codes(site, quantizer.codes(weight), quantizer.axis, step, -zero_point)


@_weight.register
def _(quantizer: Affine, site: Site, weight: Tensor) -> Quantizer:
    step, shift = quantizer.scale.float(), -quantizer.zero_point.float()
    codes = quantizer.codes(weight)
    if quantizer.qmin == 0:
        codes = codes.to(torch.uint8)
    made = _codes(site, codes, quantizer.axis, step, shift)
    if quantizer.spec.bias_correction:
        return _corrected(made, weight)
    return made


def _codes(site: Site, codes: Tensor, axis: int | None, step: Tensor, shift: Tensor) -> FrozenWeight:
    return FrozenWeight(site.quantizer.spec, axis, site.name, (codes, step.clone(), shift.clone(), None))


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


@functools.singledispatch
def _activation(quantizer: Quantizer, site: Site) -> Quantizer:
    raise _refusal(site)


@_activation.register
def _(quantizer: Float, site: Site) -> Quantizer:
    return quantizer


@_activation.register
def _(quantizer: Log2, site: Site) -> Quantizer:
    return FrozenLog2(quantizer, site.name)


@_activation.register
def _(quantizer: LSQ, site: Site) -> FrozenActivation:
    step = quantizer.scale.detach().float().clamp(min=SCALE_FLOOR)
    return FrozenActivation(quantizer.spec, quantizer.axis, site.name, _bounds(quantizer), scale=step)


def _bounds(quantizer: LSQ) -> tuple[int, int]:
    if isinstance(quantizer, AutoSignLSQ):
        return quantizer.bounds[bool(quantizer.signed > 0)]
    return quantizer.spec.qmin, quantizer.spec.qmax


@_activation.register
def _(quantizer: Affine, site: Site) -> FrozenActivation:
    zero_point = quantizer.zero_point.float().clone()
    bounds = quantizer.qmin, quantizer.qmax
    return FrozenActivation(quantizer.spec, quantizer.axis, site.name, bounds, scale=quantizer.scale.float().clone(), zero_point=zero_point)


@_activation.register
def _(quantizer: Shifted, site: Site) -> Quantizer:
    made = _activation(quantizer.quantizer, site)
    if not isinstance(made, FrozenActivation):
        raise _refusal(site)
    made.before = quantizer.offset_before.detach().float().clone()
    if quantizer.offset_after is not None:
        made.after = quantizer.offset_after.detach().float().clone()
    return made
