"""Compensate the rounding error of each channel in closed form, on calibration images.

Sources: the ridge regression is from Quantization without Tears (arXiv 2411.13918), and the
channel-wise regression from QwT-v2 (arXiv 2505.20932).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qat.model.sites import Site
from qat.ptq.runner import Runner, check_unit_finite, find_units
from qat.utils.probing import calibration_images, probing

# Strength of the pull towards a gain of 1, relative to the variance of the output.
RIDGE = 1e-3
# The lowest and the highest gain. Gains are positive, because scales must stay positive.
_GAIN_RANGE = (0.1, 10.0)
_SETTING = "ptq.method='compensate'"
log = logging.getLogger(__name__)


def compensate(net: nn.Module, float_net: nn.Module, batches: Iterable[Any]) -> int:
    """Fit each layer of a calibrated net to the same layer of the float net, in place.

    Quantized Linears and convolutions are fitted in the order in which they run. Layers that do not
    run exactly once, or that the float net does not call, are left out. The output y of each
    channel becomes g * y + b; ridge regression fits g and b to the output of the same layer in the
    float net. Gain and bias are folded into the layer: the rows of the weight and their scales are
    multiplied by g, so codes do not change, and the bias becomes g * bias + b. If there is not one
    scale per channel (one scale for a whole weight, or floats in blocks), only b is fitted. If the
    layer has no bias, only g is fitted.

    Args:
        net: a net converted with a `PtqRecipe`, whose scales are set; it runs in eval mode.
        float_net: the float net before conversion, with the same module names, on the same device.
        batches: images (B, C, H, W) each, or (images, labels) as from a loader.

    Returns:
        Number of fitted layers.

    Raises:
        UsageError: there is no layer to fit, the float net is quantized, or activations are not
            finite.
    """
    images = [calibration_images(batch, net) for batch in batches]
    num_fitted = 0
    skipped_layers = []
    with probing(net, []), probing(float_net, []):
        units, runner, float_runner = find_units(net, float_net, images, _SETTING)
        for unit, layers in units.items():
            with runner.at(unit), float_runner.at(unit):
                for site in layers:
                    if site.layer not in float_runner.order.position:
                        # Some float attentions multiply by `qkv.weight` without calling a module.
                        skipped_layers.append(site.layer)
                        continue
                    gain, bias = _fit_channels(runner, float_runner, unit, site)
                    _fold_into_layer(site, gain, bias)
                    num_fitted += 1
    if skipped_layers:
        log.info(
            "layers that are not compensated, because the float model runs no module for them: %s",
            ", ".join(skipped_layers),
        )
    log.info("compensated %d layers", num_fitted)
    return num_fitted


def _output_rows(runner: Runner, site: Site, i: int) -> Tensor:
    """Output of a layer for batch `i` as (rows, channels), float64."""
    _, output = runner.output(site.layer, i)
    if isinstance(site.owner, nn.Conv2d):
        output = output.movedim(1, -1)
    return output.flatten(0, -2).double()


def _fit_channels(
    runner: Runner, float_runner: Runner, unit: str, site: Site
) -> tuple[Tensor, Tensor]:
    """Gain and bias (out,) of one layer, float64."""
    sums = torch.zeros(())
    num_rows = 0
    for i in range(len(runner.batches)):
        y = _output_rows(runner, site, i)
        target = _output_rows(float_runner, site, i)
        sums = sums + torch.stack([y.sum(0), target.sum(0), y.square().sum(0), (y * target).sum(0)])
        num_rows += len(y)
    check_unit_finite(sums, unit, _SETTING)
    mean_y, mean_target, mean_square, mean_product = sums / num_rows
    if site.owner.bias is None:
        mean_y = torch.zeros_like(mean_y)
        mean_target = torch.zeros_like(mean_target)
    variance = mean_square - mean_y.square()
    covariance = mean_product - mean_y * mean_target
    gain = _ridge_gain(variance, covariance, mean_square)
    if site.quantizer.num_stored_scales != len(gain):
        gain = torch.ones_like(gain)
    return gain, mean_target - gain * mean_y


def _ridge_gain(variance: Tensor, covariance: Tensor, square: Tensor) -> Tensor:
    """The gain g that minimizes E(t - g y - b)^2 + RIDGE v (g - 1)^2, clamped to `_GAIN_RANGE`.

    y is the output, t the target, v the variance of y, and b the best bias. If the layer has no
    bias, b is 0 and v is E y^2. If v is within the rounding error of E y^2, g is 1.
    """
    min_variance = (1e-12 * square).clamp(min=torch.finfo(torch.float32).tiny)
    gain = (covariance + RIDGE * variance) / ((1 + RIDGE) * variance).clamp(min=min_variance)
    return torch.where(variance > min_variance, gain, 1.0).clamp(*_GAIN_RANGE)


def _fold_into_layer(site: Site, gain: Tensor, bias: Tensor) -> None:
    """Multiply a layer and its scales by gains (out,), and add a bias (out,).

    Scales change only if there is one scale per channel; the bias only if the layer has a bias.
    """
    layer: Any = site.owner
    factor = gain.to(layer.weight)
    layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.ndim - 1)))
    if site.quantizer.num_stored_scales == len(factor):
        site.quantizer.set_scale(site.quantizer.scale * factor)  # type: ignore[operator]
    if layer.bias is not None:
        layer.bias.mul_(factor).add_(bias.to(factor))
