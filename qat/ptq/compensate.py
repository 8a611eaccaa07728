"""Undo in closed form what rounding does to each channel: ridge regression on calibration images.

Sources: the regression is that of Quantization without Tears (arXiv 2411.13918); its channel-wise form, QwT-v2 (arXiv 2505.20932).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qat.model.sites import Site
from qat.ptq.runner import Runner, check_finite, find_units
from qat.utils.probing import images_of, probing

# Of the mean square of a regressor: how far an estimate is drawn to "no change".
RIDGE = 1e-3
# A scale has to stay above zero.
_GAINS = (0.1, 10.0)
_SETTING = "ptq.method='compensate'"
log = logging.getLogger(__name__)


def compensate(net: nn.Module, reference: nn.Module, batches: Iterable[Any]) -> int:
    """Fit layer after layer of a calibrated net to what the float net gives after the same layer; in place.

    After every quantized Linear and convolution, in the order in which they run, y <- g * y + b for each output channel is the ridge
    regression of the float layer's output on the quantized one's, each in its own net. Gain and bias are folded: the rows of the weight
    and their scales are multiplied by g, so its codes stay, and the bias becomes g * bias + b. Without a scale for each channel
    (one for a whole weight, floats in blocks) there is a bias alone, and without a bias a gain alone.

    Args:
        net: converted with a `PtqRecipe`, scales filled; runs in eval mode.
        reference: the float net that it was made of, with modules of the same names, on the same device.
        batches: images (B, C, H, W) each, or what a loader gives, (images, labels).

    Returns:
        Number of layers that were fitted.

    Raises:
        UsageError: nothing to fit, a reference that is quantized, or activations that are not finite.
    """
    images = [images_of(batch, net) for batch in batches]
    with probing(net, []), probing(reference, []):
        units, ours, theirs = find_units(net, reference, images, _SETTING)
        # Some attentions multiply by `qkv.weight` in float and call no module.
        left_out = [
            site.layer
            for layers in units.values()
            for site in layers
            if site.layer not in theirs.order.position
        ]
        for unit, layers in units.items():
            with ours.at(unit), theirs.at(unit):
                for site in layers:
                    if site.layer not in left_out:
                        _fold(site, *_channel_fit(ours, theirs, unit, site))
    if left_out:
        log.info(
            "not compensated, because the float model has no module for them: %s",
            ", ".join(left_out),
        )
    fitted = sum(map(len, units.values())) - len(left_out)
    log.info("compensated %d layers", fitted)
    return fitted


def _channel_fit(ours: Runner, theirs: Runner, unit: str, site: Site) -> tuple[Tensor, Tensor]:
    """Gain and bias (out,) of one layer, float64."""
    sums, rows = torch.zeros(()), 0
    for i in range(len(ours.batches)):
        # (rows, channels) float64
        y, target = (
            (t.movedim(1, -1) if isinstance(site.owner, nn.Conv2d) else t).flatten(0, -2).double()
            for t in (runner.output(site.layer, i)[1] for runner in (ours, theirs))
        )
        sums = sums + torch.stack([y.sum(0), target.sum(0), y.square().sum(0), (y * target).sum(0)])
        rows += len(y)
    check_finite(sums, unit, _SETTING)
    mean_y, mean_t, square, product = sums / rows
    if site.owner.bias is None:
        mean_y, mean_t = torch.zeros_like(mean_y), torch.zeros_like(mean_t)
    gain = _ridge_gain(square - mean_y.square(), product - mean_y * mean_t, square)
    if site.quantizer.n_scales != len(gain):
        gain = torch.ones_like(gain)
    return gain, mean_t - gain * mean_y


def _ridge_gain(variance: Tensor, covariance: Tensor, square: Tensor) -> Tensor:
    """Argmin over g of E(t - g y)^2 + RIDGE var(y) (g - 1)^2; 1 where a channel is constant, up to the rounding of its E y^2."""
    floor = (1e-12 * square).clamp(min=torch.finfo(torch.float32).tiny)
    gain = (covariance + RIDGE * variance) / ((1 + RIDGE) * variance).clamp(min=floor)
    return torch.where(variance > floor, gain, 1.0).clamp(*_GAINS)


def _fold(site: Site, gain: Tensor, bias: Tensor) -> None:
    layer: Any = site.owner
    factor = gain.to(layer.weight)
    layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.ndim - 1)))
    if site.quantizer.n_scales == len(factor):
        site.quantizer.set_scale(site.quantizer.scale * factor)  # type: ignore[operator]
    if layer.bias is not None:
        layer.bias.mul_(factor).add_(bias.to(factor))
