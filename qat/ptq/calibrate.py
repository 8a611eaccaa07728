"""Fill the scales of a net converted with a `PtqRecipe`: ranges are found while the net runs in float. Source: FQ-ViT, arXiv 2111.13824."""

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
from qat.model.sites import iter_quantizers
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq.runner import Forward, patched
from qat.quantizers import Affine
from qat.utils.probing import allow_unset_scales, images_of, probing


@dataclass(frozen=True)
class Calibration:
    """What the scales of a net were made of.

    Attributes:
        images: seen.
        batches: seen.
        scales: in the net.
    """

    images: int
    batches: int
    scales: int


@contextlib.contextmanager
def in_float(net: nn.Module) -> Generator[None]:
    """While it lasts nothing is rounded: quantizers give back what they get, integer norms are norms."""
    forwards: dict[nn.Module, Forward] = {
        m: m.in_float for m in net.modules() if isinstance(m, IntegerLayerNorm)
    }
    with (
        allow_unset_scales(),
        patched(forwards | {site.quantizer: lambda x: x for site in iter_quantizers(net)}),
    ):
        yield


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Any]) -> Calibration:
    """Find the range of every quantizer and set its scale and zero point. No quantizer sees the rounding of another.

    Ranges are taken over all batches; where candidates are tried (omse, mse, ptf), on the last one, which passes once more. The same
    batches give the same scales, to the last bit.

    Args:
        net: converted with a `PtqRecipe`; runs in eval mode, its mode is restored. Scales that it has are replaced.
        batches: images (B, C, H, W) each, or what a loader gives, (images, labels); moved to the net's device.

    Raises:
        UsageError: no affine quantizer, no batch, other things than finite images, or a quantizer that no batch reached.
    """
    found = [
        (s, s.quantizer)
        for s in iter_quantizers(net)
        if type(s.quantizer) is Affine and s.quantizer.n_scales
    ]
    if not found:
        raise UsageError(
            "calibrate: the model has no affine quantizer; convert it with a qat.PtqRecipe first"
        )
    for site, quantizer in found:
        if site.is_weight:
            quantizer.calibrate(site.latent(), {})
    activations = [quantizer for site, quantizer in found if not site.is_weight]
    states: dict[Affine, RangeState] = {}

    def note(quantizer: Affine, args: tuple[Tensor, ...]) -> None:
        states[quantizer] = observe(
            states.get(quantizer), args[0], quantizer.axis, quantizer.method
        )

    images, count, last = 0, 0, None
    with (
        probing(net, [quantizer.register_forward_pre_hook(note) for quantizer in activations]),
        in_float(net),
    ):
        for batch in batches:
            last = images_of(batch, net)
            net(last)
            images, count = images + len(last), count + 1
    if last is None:
        raise UsageError("calibrate: must have at least one batch of images")
    searching = [quantizer for quantizer in activations if quantizer.method in SEARCHES]
    if searching:
        hooks = [
            q.register_forward_pre_hook(lambda q, args: q.fill(states[q], args[0]))
            for q in searching
        ]
        with probing(net, hooks), in_float(net):
            net(last)
    for quantizer, state in states.items():
        if quantizer.method not in SEARCHES:
            quantizer.fill(state, last)
    assert_ready(net)
    return Calibration(images, count, sum(q.n_scales for _, q in found))
