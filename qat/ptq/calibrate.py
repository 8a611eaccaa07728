"""Fill the scales of a net converted with a `PtqRecipe`: ranges are found while the net runs in float. Source: FQ-ViT, arXiv 2111.13824."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.observers import MOVING, SEARCHES, RangeState, affine_from_state, observe, reaching_zero
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
        images: seen by this process.
        batches: seen by this process.
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
        seen: number of batches.

    Args:
        quantizer: has its shapes already.
    """

    def __init__(self, quantizer: Affine) -> None:
        self.quantizer, self.axis = quantizer, quantizer.axis
        self.method = quantizer.spec.observer or "minmax"
        self.state: RangeState | None = None
        self.seen = 0

    def update(self, x: Tensor) -> None:
        """Take in one batch, any shape."""
        self.state = observe(self.state, x, self.axis, self.method)
        self.seen += 1

    def join(self, group: dist.ProcessGroup) -> None:
        """Make one range of those of all processes: the outermost ends, or their mean weighted by the number of batches."""
        low, high = self.state or (torch.zeros_like(self.quantizer.scale), torch.zeros_like(self.quantizer.scale))
        mine = torch.stack([low, high, torch.full_like(low, self.seen)])
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, mine, group=group)
        self.take(torch.stack(gathered))

    def take(self, gathered: Tensor) -> None:
        """Join (processes, 3, n): low, high, batches seen."""
        gathered = gathered[gathered[:, 2, 0] > 0]
        if not len(gathered):
            return
        low, high, seen = gathered.unbind(1)
        if self.method in MOVING:
            share = seen / seen.sum(0)
            low, high = (low * share).sum(0, keepdim=True), (high * share).sum(0, keepdim=True)
        self.state, self.seen = RangeState(low.amin(0), high.amax(0)), int(seen[:, 0].sum())

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
def calibrate(net: nn.Module, batches: Iterable[Tensor], *, group: dist.ProcessGroup | None = None) -> Calibration:
    """Find the range of every quantizer and set its scale and zero point. No quantizer sees the rounding of another.

    Ranges are taken over all batches; where candidates are tried (omse, mse, ptf), on the last one, which passes once more. The same
    batches give the same scales, to the last bit.

    Args:
        net: converted with a `PtqRecipe`; runs in eval mode, its mode is restored. Scales that it has are replaced.
        batches: images (B, C, H, W) each, moved to the net's device.
        group: processes that share the batches; each calls this with its own ones and all get the same scales.

    Raises:
        UsageError: no affine quantizer, no batch, images that are not finite, or a quantizer that no batch reached.
    """
    sites = [s for s in iter_quantizers(net) if type(s.quantizer) is Affine and s.quantizer.scale is not None]
    if not sites:
        raise UsageError("calibrate: the net has no affine quantizer; convert it with a qat.PtqRecipe first")
    observers = {s.quantizer: Observer(s.quantizer) for s in sites if isinstance(s.quantizer, Affine)}
    for site in sites:
        if site.is_weight:
            observers[site.quantizer].update(site.latent())
            observers[site.quantizer].fill(site.latent())
    activations = [observers[site.quantizer] for site in sites if not site.is_weight]
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
    if group is not None:
        for observer in activations:
            observer.join(group)
    searching = [o for o in activations if o.method in SEARCHES]
    if any(o.seen for o in searching):
        hooks = [o.quantizer.register_forward_pre_hook(lambda _, args, o=o: o.fill(args[0])) for o in searching]
        with probing(net, hooks), in_float(net):
            net(last)
    for observer in activations:
        if observer.method not in SEARCHES:
            observer.fill(last)
        if group is not None:  # where candidates are tried, those of the first process hold
            for tensor in observer.quantizer.buffers():
                dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
    assert_ready(net)
    methods = [observer.method for observer in observers.values()]
    return Calibration(images, count, sum(site.quantizer.n_scales for site in sites), {m: methods.count(m) for m in sorted(set(methods))})
