"""Fill the scales of a net converted with a `PtqRecipe`: ranges are found while the net runs in float. Source: FQ-ViT, arXiv 2111.13824."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.scales import assert_ready
from qat.model.sites import iter_quantizers
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq.distributed import Ranks
from qat.ptq.observers import Observer
from qat.ptq.patching import Forward, patched
from qat.quantizers import Affine, Quantizer
from qat.utils.probing import allow_unset_scales, probing

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


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


@contextlib.contextmanager
def in_float(net: nn.Module) -> Generator[None]:
    """While it lasts nothing is rounded: quantizers give back what they get, integer norms are norms."""
    forwards: dict[nn.Module, Forward] = {m: m.in_float for m in net.modules() if isinstance(m, IntegerLayerNorm)}
    with allow_unset_scales(), patched(forwards | {site.quantizer: _unchanged for site in iter_quantizers(net)}):
        yield


def _unchanged(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor], *, ranks: Ranks | None = None) -> Calibration:
    """Find the range of every quantizer and set its scale and zero point. No quantizer sees the rounding of another.

    Ranges are taken over all batches; where candidates are tried (omse, mse, ptf), on the last one, which passes once more. The same
    batches give the same scales, to the last bit.

    Args:
        net: converted with a `PtqRecipe`; runs in eval mode, its mode is restored. Scales that it has are replaced.
        batches: images (B, C, H, W) each, moved to the net's device.
        ranks: processes that share the batches; each calls this with its own ones and all get the same scales.

    Raises:
        UsageError: no affine quantizer, no batch, images that are not finite, or a quantizer that no batch reached.
    """
    sites = [s for s in iter_quantizers(net) if type(s.quantizer) is Affine and s.quantizer.scale is not None]
    if not sites:
        raise UsageError("calibrate: the net has no affine quantizer; convert it with a qat.PtqRecipe first")
    observers: dict[Quantizer, Observer] = {s.quantizer: Observer(s.quantizer) for s in sites if isinstance(s.quantizer, Affine)}
    for site in sites:
        if site.is_weight:
            observers[site.quantizer].update(site.latent())
            _fill(site.quantizer, observers[site.quantizer], site.latent())
    activations = {site.quantizer: observers[site.quantizer] for site in sites if not site.is_weight}
    images, count, last = _observe(net, batches, activations)
    _conclude(net, last, activations, ranks or Ranks())
    assert_ready(net)
    methods = [observer.method for observer in observers.values()]
    return Calibration(images, count, sum(site.quantizer.n_scales for site in sites), {m: methods.count(m) for m in sorted(set(methods))})


def _observe(net: nn.Module, batches: Iterable[Tensor], observers: dict[Quantizer, Observer]) -> tuple[int, int, Tensor]:
    """Run all batches; gives the numbers of images and batches, and the last one."""
    device, images, count, last = next(net.parameters()).device, 0, 0, None
    with _watched(net, {quantizer: _updating(observer) for quantizer, observer in observers.items()}):
        for batch in batches:
            if not batch.isfinite().all():
                raise UsageError("calibration images hold NaN or infinity; look at data.mean, data.std and the files")
            last = batch.to(device)
            net(last)
            images, count = images + len(batch), count + 1
    if last is None:
        raise UsageError("calibrate: there is no batch of images")
    return images, count, last


def _conclude(net: nn.Module, last: Tensor, observers: dict[Quantizer, Observer], ranks: Ranks) -> None:
    """Join the ranges of all processes and set the scales; where candidates are tried, those of the first process hold."""
    for observer in observers.values():
        observer.join(ranks)
    searching = {quantizer: _filling(observer) for quantizer, observer in observers.items() if observer.searches and observer.seen}
    if searching:
        with _watched(net, searching):
            net(last)
    for quantizer, observer in observers.items():
        if observer.seen and not observer.searches:
            _fill(quantizer, observer, last)
        if ranks.group is not None:
            for tensor in quantizer.buffers():
                dist.broadcast(tensor, dist.get_global_rank(ranks.group, 0), group=ranks.group)


@contextlib.contextmanager
def _watched(net: nn.Module, hooks: dict[Quantizer, Hook]) -> Generator[None]:
    with probing(net, [quantizer.register_forward_pre_hook(hook) for quantizer, hook in hooks.items()]), in_float(net):
        yield


def _updating(observer: Observer) -> Hook:
    return lambda _, args: observer.update(args[0])


def _filling(observer: Observer) -> Hook:
    return lambda quantizer, args: _fill(quantizer, observer, args[0])


def _fill(quantizer: nn.Module, observer: Observer, x: Tensor) -> None:
    assert isinstance(quantizer, Affine)  # noqa: S101  (narrows a type)
    scale, zero_point = observer.scale(x)
    quantizer.scale.copy_(scale)
    quantizer.zero_point.copy_(zero_point)
