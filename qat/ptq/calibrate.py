"""Fill the scales of a net converted with a `PtqRecipe`: ranges are found while the net runs in float. Source: FQ-ViT, arXiv 2111.13824."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.observers import SEARCHES, RangeState, affine_from_state, observe, reaching_zero
from qat.model.scales import assert_ready
from qat.model.sites import iter_quantizers
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq.patching import Forward, patched
from qat.quantizers import Affine
from qat.utils.probing import allow_unset_scales, probing


@dataclass(frozen=True)
class Calibration:
    """What the scales of a net were made of.

    Attributes:
        images: seen.
        batches: seen.
        scales: in the net.
        observers: number of quantizers by the method that found their range.
    """

    images: int
    batches: int
    scales: int
    observers: dict[str, int]


class Observer:
    """Range of what one quantizer sees while calibration images pass.

    Attributes:
        method: one of `qat.functional.observers.OBSERVERS`.
        state: ends of the range, (n,) each, one per scale, in the unit of the input; None until something was seen.

    Args:
        quantizer: has its shapes already.
    """

    def __init__(self, quantizer: Affine) -> None:
        self.quantizer, self.axis = quantizer, quantizer.axis
        self.method = quantizer.spec.observer or "minmax"
        self.state: RangeState | None = None

    def update(self, x: Tensor) -> None:
        """Take in one batch, any shape."""
        self.state = observe(self.state, x, self.axis, self.method)

    def fill(self, x: Tensor) -> None:
        """Set scale and zero point of the quantizer; `x`, the last batch, is only read where candidates are tried on it."""
        if self.state is None:
            return
        bits, signed = self.quantizer.spec.bits, bool(self.quantizer.spec.signed)
        scale, zero_point = affine_from_state(reaching_zero(self.state), x, bits, signed=signed, axis=self.axis, method=self.method)
        self.quantizer.scale.copy_(scale)
        self.quantizer.zero_point.copy_(zero_point)


@contextlib.contextmanager
def in_float(net: nn.Module) -> Generator[None]:
    """While it lasts nothing is rounded: quantizers give back what they get, integer norms are norms."""
    forwards: dict[nn.Module, Forward] = {m: m.in_float for m in net.modules() if isinstance(m, IntegerLayerNorm)}
    with allow_unset_scales(), patched(forwards | {site.quantizer: lambda x: x for site in iter_quantizers(net)}):
        yield


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor]) -> Calibration:
    """Find the range of every quantizer and set its scale and zero point. No quantizer sees the rounding of another.

    Ranges are taken over all batches; where candidates are tried (omse, mse, ptf), on the last one, which passes once more. The same
    batches give the same scales, to the last bit.

    Args:
        net: converted with a `PtqRecipe`; runs in eval mode, its mode is restored. Scales that it has are replaced.
        batches: images (B, C, H, W) each, moved to the net's device.

    Raises:
        UsageError: no affine quantizer, no batch, images that are not finite, or a quantizer that no batch reached.
    """
    sites = [s for s in iter_quantizers(net) if type(s.quantizer) is Affine and s.quantizer.scale is not None]
    if not sites:
        raise UsageError("calibrate: the net has no affine quantizer; convert it with a qat.PtqRecipe first")
    observers = [Observer(s.quantizer) for s in sites if isinstance(s.quantizer, Affine)]
    activations = []
    for site, observer in zip(sites, observers, strict=True):
        if site.is_weight:
            observer.update(site.latent())
            observer.fill(site.latent())
        else:
            activations.append(observer)
    device, images, count, last = next(net.parameters()).device, 0, 0, None
    hooks = [o.quantizer.register_forward_pre_hook(lambda _, args, o=o: o.update(args[0])) for o in activations]
    with probing(net, hooks), in_float(net):
        for batch in batches:
            if not batch.isfinite().all():
                raise UsageError("calibration images hold NaN or infinity; look at data.mean, data.std and the files")
            last = batch.to(device)
            net(last)
            images, count = images + len(batch), count + 1
    if last is None:
        raise UsageError("calibrate: there is no batch of images")
    searching = [o for o in activations if o.method in SEARCHES]
    if searching:
        hooks = [o.quantizer.register_forward_pre_hook(lambda _, args, o=o: o.fill(args[0])) for o in searching]
        with probing(net, hooks), in_float(net):
            net(last)
    for observer in activations:
        if observer.method not in SEARCHES:
            observer.fill(last)
    assert_ready(net)
    methods = [observer.method for observer in observers]
    return Calibration(images, count, sum(site.quantizer.n_scales for site in sites), {m: methods.count(m) for m in sorted(set(methods))})
