"""Calibrate a net that was converted with a `PtqRecipe`: find ranges in a float run, set scales.

Source: FQ-ViT, arXiv 2111.13824.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.observers import SEARCHES, RangeState, observe
from qat.model.scales import assert_ready
from qat.model.sites import Site, iter_quantizers
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq.runner import Forward, patch_forwards
from qat.quantizers import Affine, Fp8
from qat.utils.probing import allow_unset_scales, calibration_images, probing


@dataclass(frozen=True)
class Calibration:
    """Counts of a calibration.

    Attributes:
        images: number of images.
        batches: number of batches.
        scales: number of scales of affine and fp8 quantizers.
    """

    images: int
    batches: int
    scales: int


@contextlib.contextmanager
def in_float(net: nn.Module) -> Generator[None]:
    """Make the net compute in float in this block, even with integer norms or unset scales."""
    forwards: dict[nn.Module, Forward] = {}
    for module in net.modules():
        if isinstance(module, IntegerLayerNorm):
            forwards[module] = module.in_float
    for site in iter_quantizers(net):
        forwards[site.quantizer] = lambda x: x
    with allow_unset_scales(), patch_forwards(forwards):
        yield


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Any]) -> Calibration:
    """Find the range of every affine or fp8 quantizer, and set scales and zero points.

    The net runs in float, so ranges do not depend on the rounding of other quantizers. Every batch
    counts for an activation's range, whose ends are the smallest and largest value or, with ema and
    percentile, moving averages. The methods omse, mse, mse_ends and ptf then try candidates on the
    last batch, which runs once more. Two calibrations on the same batches set bit-identical
    scales.

    Args:
        net: a net converted with a `PtqRecipe`. It runs in eval mode, and its mode is restored
            afterwards. Existing scales are replaced.
        batches: images (B, C, H, W) each, or (images, labels) as from a loader; moved to the device
            of the net.

    Raises:
        UsageError: the net has no affine or fp8 scales, there is no batch, a batch contains
            anything but finite images, or a quantizer without scales did not run.
    """
    weights: list[tuple[Any, Site]] = []
    activations: list[Any] = []
    for site in iter_quantizers(net):
        quantizer = site.quantizer
        if type(quantizer) not in {Affine, Fp8} or not quantizer.num_stored_scales:
            continue
        if site.is_weight:
            weights.append((quantizer, site))
        else:
            activations.append(quantizer)
    if not weights and not activations:
        raise UsageError(
            "calibrate: the model has no affine or fp8 scales; convert it first, with a "
            "qat.PtqRecipe"
        )
    states: dict[Any, RangeState] = {}

    def observe_input(quantizer: Any, args: tuple[Tensor, ...]) -> None:
        state = states.get(quantizer)
        states[quantizer] = observe(state, args[0], quantizer.axis, quantizer.method)

    num_images = 0
    num_batches = 0
    images = None
    hooks = [quantizer.register_forward_pre_hook(observe_input) for quantizer in activations]
    with probing(net, hooks), in_float(net):
        for batch in batches:
            images = calibration_images(batch, net)
            net(images)
            num_images += len(images)
            num_batches += 1
    if images is None:
        raise UsageError("calibrate: batches is empty; must contain at least one batch of images")
    for quantizer, site in weights:
        quantizer.calibrate(site.latent(), {})
    _set_activation_scales(net, activations, states, images)
    assert_ready(net)
    scales = sum(quantizer.num_stored_scales for quantizer, _ in weights)
    scales += sum(quantizer.num_stored_scales for quantizer in activations)
    return Calibration(num_images, num_batches, scales)


def _set_activation_scales(
    net: nn.Module, activations: list[Any], states: dict[Any, RangeState], images: Tensor
) -> None:
    """Set the scales of activations from ranges; some methods try candidates on the last batch."""

    def fill_from_input(quantizer: Any, args: tuple[Tensor, ...]) -> None:
        quantizer.set_from_range(states[quantizer], args[0])

    search_quantizers = [quantizer for quantizer in activations if quantizer.method in SEARCHES]
    if search_quantizers:
        hooks = [
            quantizer.register_forward_pre_hook(fill_from_input) for quantizer in search_quantizers
        ]
        with probing(net, hooks), in_float(net):
            net(images)
    for quantizer, state in states.items():
        if quantizer.method not in SEARCHES:
            quantizer.set_from_range(state, images)
