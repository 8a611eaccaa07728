"""Fill the scales of a converted net from data, say which are missing, and let no net run without them."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.sites import iter_quantizers
from qat.quantizers import Affine, Quantizer
from qat.utils.probing import images_of, probing, unset_scales_allowed
from qat.utils.validate import check_int

log = logging.getLogger(__name__)
LOG_EVERY_S = 10


def is_ready(quantizer: Quantizer) -> bool:
    """True if no parameter or buffer of the quantizer holds a NaN."""
    return not any(
        bool(t.isnan().any())
        for t in (*quantizer.parameters(), *quantizer.buffers())
        if t.is_floating_point()
    )


def assert_ready(net: nn.Module) -> None:
    """Raise `UsageError` naming the first quantizer whose scales were never filled; where none is, the net has no `guard` any more."""
    for site in iter_quantizers(net):
        if not is_ready(site.quantizer):
            filling = (
                "qat.ptq.calibrate" if type(site.quantizer) is Affine else "qat.initialize_scales"
            )
            raise UsageError(
                f"scales of {site.name} are not initialised; call {filling}(net, batches) or load a checkpoint"
            )
    for module in net.modules():
        for key in [
            key for key, hook in module._forward_pre_hooks.items() if hook is _check_before_forward
        ]:
            module._forward_pre_hooks.pop(key, None)


def _check_values(net: nn.Module) -> None:
    """Raise `UsageError` naming the first tensor on the meta device."""
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        if tensor.is_meta:
            raise UsageError(
                f"{name}: is on the meta device; must hold values: load_state_dict(state, assign=True) fills what a "
                "state dict stores, anything else needs a model that was built on a device"
            )


def check_finite(net: nn.Module, origin: str, *, unset: bool = False) -> None:
    """Raise `UsageError` if a tensor of a net from `origin` is NaN or infinite: whatever it computes would be, too.

    Args:
        net: converted or float.
        origin: how an error calls it, `ckpt='x.pt'`.
        unset: scales that were never set, which are NaN, are allowed.
    """
    quantizers = [site.quantizer for site in iter_quantizers(net)]
    scales = {
        id(t) for quantizer in quantizers for t in (*quantizer.parameters(), *quantizer.buffers())
    }
    for name, tensor in net.state_dict(keep_vars=True).items():
        is_scale = id(tensor) in scales
        damaged = tensor.isinf() if is_scale and unset else ~tensor.isfinite()
        if damaged.any():
            what = "weight" if isinstance(tensor, nn.Parameter) else "buffer"
            raise UsageError(
                f"{origin}: its {what} {name} holds NaN or infinity: a run that diverged, or scales that were never initialised"
            )


def guard(net: nn.Module) -> None:
    """Have `net` raise when it is called, until the first call, or `assert_ready`, that finds all scales set.

    A quantizer or a layer called by itself is not checked, nor is a compiled or exported graph. A net whose quantizers hold no
    tensors has nothing to check. Loading a state dict that lacks scales begins it again.
    """
    if any(site.quantizer.state_dict() for site in iter_quantizers(net)):
        net.register_forward_pre_hook(_check_before_forward, prepend=True)
        net.register_load_state_dict_post_hook(_check_after_load)


def _check_after_load(net: nn.Module, _: Any) -> None:
    unguarded = _check_before_forward not in net._forward_pre_hooks.values()
    if unguarded and not all(is_ready(site.quantizer) for site in iter_quantizers(net)):
        net.register_forward_pre_hook(_check_before_forward, prepend=True)


def _check_before_forward(net: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or unset_scales_allowed.get():
        return
    if args and isinstance(args[0], Tensor) and not args[0].is_meta:
        _check_values(net)
    with contextlib.suppress(
        RuntimeError
    ):  # a fake tensor, or one on the meta device, has no values to look at
        assert_ready(net)


class _Progress:
    """Says every ten seconds how far the search for scales is."""

    def __init__(self, quantizers: int) -> None:
        self.quantizers = quantizers
        self.images = 0
        self.calibrated = 0
        self.began = self.last = time.monotonic()

    def begin_batch(self, images: int) -> None:
        """Count a batch of so many images."""
        self.images += images
        self.calibrated = 0

    def calibrate(self, state: dict[str, Any], quantizer: Any, args: tuple[Tensor, ...]) -> None:
        """Fold one input into the scales of a quantizer; a forward pre-hook once `state` is given."""
        quantizer.calibrate(args[0], state)
        self.calibrated += 1
        now = time.monotonic()
        if now - self.last < LOG_EVERY_S:
            return
        self.last = now
        # A warning, because Python shows no lower level unless it is asked to.
        log.warning(
            "initialize_scales: %.0f s, %d images, %d of %d quantizers",
            now - self.began,
            self.images,
            self.calibrated,
            self.quantizers,
        )


def _first_images(batches: Iterable[Any], net: nn.Module, max_images: int) -> Iterator[Tensor]:
    """Images of each batch, `max_images` in all; no batch is read after these."""
    left = max_images
    for batch in batches:
        images = images_of(batch, net)[:left]
        left -= len(images)
        yield images
        if not left:
            return


def initialize_scales(
    net: nn.Module, batches: Iterable[Any], *, max_images: int = 256
) -> nn.Module:
    """Set every scale that is still NaN, each quantizer seeing its input as the quantizers before it leave it.

    Scales that hold numbers already (from a checkpoint) stay. With one batch the result is the reference's rule; with several,
    statistics are averaged (min-max: joined) over them. Calling a converted net that still lacks scales raises (`guard`).

    Args:
        net: a converted net; runs in eval mode, its mode is restored.
        batches: images (B, C, H, W) each, or what a loader gives, (images, labels); moved to the net's device.
        max_images: images that are used at most, the first ones.

    Returns:
        `net` itself.

    Raises:
        UsageError: no batch, other things than finite images, or a quantizer that no batch reached.
    """
    _check_values(net)
    pending = [site.quantizer for site in iter_quantizers(net) if not is_ready(site.quantizer)]
    if not pending:
        return net
    check_int("max_images", max_images, 1)
    unset = [copy.deepcopy(quantizer.state_dict()) for quantizer in pending]
    progress = _Progress(len(pending))
    try:
        with probing(
            net,
            [
                quantizer.register_forward_pre_hook(functools.partial(progress.calibrate, {}))
                for quantizer in pending
            ],
        ):
            for images in _first_images(batches, net, max_images):
                progress.begin_batch(len(images))
                net(images)
            assert_ready(net)
    except BaseException:  # scales of some batches would look like those of all
        for quantizer, state in zip(pending, unset, strict=True):
            quantizer.load_state_dict(state)
        raise
    return net
