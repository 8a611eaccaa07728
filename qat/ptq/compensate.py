"""Undo in closed form what rounding does to each channel, or to a block: ridge regression on calibration images.

Sources: the regression is that of Quantization without Tears (arXiv 2411.13918); its channel-wise form, QwT-v2 (arXiv 2505.20932).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.compensation import COMPENSATION
from qat.model.sites import Site
from qat.ptq.units import Runner, Unit, check_finite, find_units
from qat.utils.probing import probing

# Of the mean square of a regressor: how far an estimate is drawn to "no change".
RIDGE = 1e-3
# A scale has to stay above zero.
_GAINS = (0.1, 10.0)
_SETTING = "ptq.method='compensate'"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compensated:
    """What was fitted.

    Attributes:
        layers: number of layers with a gain and a bias for each output channel, folded into them.
        matrices: number of blocks with a matrix of their own.
        added_bytes: float32 weights and biases of the matrices; what is folded adds nothing.
    """

    layers: int
    matrices: int
    added_bytes: int


def compensate(net: nn.Module, reference: nn.Module, batches: Sequence[Tensor], *, matrix: bool = False) -> Compensated:
    """Fit layer after layer of a calibrated net to what the float net gives behind the same layer; in place.

    Behind every quantized Linear and convolution, in the order in which they run, y <- g * y + b for each output channel is the ridge
    regression of the float layer's output on the quantized one's, each in its own net. Gain and bias are folded: the rows of the weight
    and their scales are multiplied by g, so its codes stay, and the bias becomes g * bias + b. With one scale for a whole weight there is
    a bias alone, and without a bias a gain alone.

    Args:
        net: converted with a `PtqRecipe`, scales filled; runs in eval mode.
        reference: the float net that it was made of, with modules of the same names, on the same device.
        batches: images (B, C, H, W) each.
        matrix: also fit y <- y + W x + b behind every block, for nets converted with `compensation="matrix"`.

    Raises:
        UsageError: nothing to fit, or activations that are not finite.
    """
    device = next(net.parameters()).device
    batches = [batch.to(device) for batch in batches]
    with probing(net, []), probing(reference, []):
        units = find_units(net, batches[0][:1], _SETTING)
        names = [unit.name for unit in units]
        pair = Runner(net, names, batches), Runner(reference, names, batches)
        units, left_out = _comparable(units, pair[1])
        fitted = [linear for unit in units if (linear := _fit_unit(pair, unit, matrix=matrix)) is not None]
    if left_out:
        log.info("not compensated, as the float net calls no module for them: %s", ", ".join(left_out))
    layers = sum(len(unit.layers) for unit in units)
    added = sum(p.numel() * p.element_size() for linear in fitted for p in linear.parameters())
    log.info("compensation of %d layers and %d blocks; %d bytes added", layers, len(fitted), added)
    return Compensated(layers, len(fitted), added)


def _comparable(units: Sequence[Unit], reference: Runner) -> tuple[list[Unit], list[str]]:
    """The units with the layers that the float net calls as modules too, and the others: some attentions multiply by `qkv.weight`."""
    kept = [Unit(unit.name, tuple(site for site in unit.layers if site.layer in reference.order)) for unit in units]
    return kept, [site.layer for unit in units for site in unit.layers if site.layer not in reference.order]


def _fit_unit(pair: tuple[Runner, Runner], unit: Unit, *, matrix: bool) -> nn.Linear | None:
    """Gains and biases of its layers, then its matrix, which is given back, where it has one and is to have it."""
    linear = getattr(pair[0].modules[unit.name], COMPENSATION, None) if matrix else None
    with pair[0].at(unit.name), pair[1].at(unit.name):
        for site in unit.layers:
            _fold(site, *_channel_fit(pair, unit, site))
        if linear is not None:
            _fit_matrix(pair, unit, linear)
    return linear


def _channel_fit(pair: tuple[Runner, Runner], unit: Unit, site: Site) -> tuple[Tensor, Tensor]:
    """Gain and bias (out,) of one layer, float64."""
    name, sums, rows = site.layer, None, 0
    has_bias = site.owner.bias is not None
    for i in range(len(pair[0].batches)):
        y, target = (_rows(runner.output(name, i)[1], site.owner) for runner in pair)
        check_finite(y, unit.name, _SETTING)
        check_finite(target, unit.name, _SETTING)
        found = torch.stack([y.sum(0), target.sum(0), y.square().sum(0), (y * target).sum(0)])
        sums, rows = found if sums is None else sums + found, rows + len(y)
    assert sums is not None  # noqa: S101  (narrows a type)
    mean_y, mean_t, square, product = sums / rows
    if not has_bias:
        mean_y, mean_t = torch.zeros_like(mean_y), torch.zeros_like(mean_t)
    gain = _ridge_gain(square - mean_y.square(), product - mean_y * mean_t, square)
    if site.quantizer.n_scales == 1 < len(gain):
        gain = torch.ones_like(gain)
    return gain, mean_t - gain * mean_y


def _ridge_gain(variance: Tensor, covariance: Tensor, square: Tensor) -> Tensor:
    """Argmin over g of E(t - g y)^2 + RIDGE var(y) (g - 1)^2; 1 where a channel is constant, up to the rounding of its E y^2."""
    floor = (1e-12 * square).clamp(min=torch.finfo(torch.float32).tiny)
    gain = (covariance + RIDGE * variance) / ((1 + RIDGE) * variance).clamp(min=floor)
    return torch.where(variance > floor, gain, 1.0).clamp(*_GAINS)


def _rows(y: Tensor, layer: nn.Module) -> Tensor:
    """(rows, channels) float64."""
    return (y.movedim(1, -1) if isinstance(layer, nn.Conv2d) else y).flatten(0, -2).double()


@torch.no_grad()
def _fold(site: Site, gain: Tensor, bias: Tensor) -> None:
    layer = site.owner
    weight, old = layer.weight, layer.bias
    assert isinstance(weight, Tensor)  # noqa: S101  (narrows a type)
    factor = gain.to(weight)
    weight.mul_(factor.view(-1, *[1] * (weight.ndim - 1)))
    if site.quantizer.n_scales == len(factor):
        site.quantizer.set_scale(site.quantizer.scale * factor)  # type: ignore[operator]
    if isinstance(old, Tensor):
        old.mul_(factor).add_(bias.to(old))


def _fit_matrix(pair: tuple[Runner, Runner], unit: Unit, linear: nn.Linear) -> None:
    """Ridge regression of a block's error on its input: W (C, C) and b (C,) of `linear`, from float64 sums."""
    width = linear.in_features + 1
    gram = torch.zeros(width, width, dtype=torch.float64, device=linear.weight.device)
    cross = gram.new_zeros(width, linear.out_features)
    for i in range(len(pair[0].batches)):
        args, y = pair[0].output(unit.name, i)
        x = args[0].flatten(0, -2).double()
        error = (pair[1].output(unit.name, i)[1] - y).flatten(0, -2).double()
        check_finite(error, unit.name, _SETTING)
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        gram, cross = gram + x.T @ x, cross + x.T @ error
    penalty = torch.full((width,), float(RIDGE * gram.diagonal()[:-1].mean()), dtype=torch.float64, device=gram.device)
    penalty[-1] = 0.0
    solution = torch.linalg.lstsq(gram + penalty.diag(), cross).solution
    if not bool(solution.isfinite().all()):
        raise UsageError(f"{_SETTING}: the regression of {unit.name} has no finite solution; must be more images or compensation=affine")
    linear.weight.copy_(solution[:-1].T)
    linear.bias.copy_(solution[-1])
