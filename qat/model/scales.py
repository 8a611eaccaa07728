"""Set the scales of a converted model from data, and check them before the model runs."""

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
from qat.utils.probing import calibration_images, probing, unset_scales_allowed
from qat.utils.validate import check_int

log = logging.getLogger(__name__)
LOG_EVERY_S = 10


def is_ready(quantizer: Quantizer) -> bool:
    """True if no parameter or buffer of the quantizer contains a NaN."""
    for tensor in (*quantizer.parameters(), *quantizer.buffers()):
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            return False
    return True


def assert_ready(net: nn.Module) -> None:
    """Raise `UsageError` for the first quantizer with unset scales; else remove the `guard`."""
    for site in iter_quantizers(net):
        if is_ready(site.quantizer):
            continue
        is_affine = type(site.quantizer) is Affine
        function = "qat.ptq.calibrate" if is_affine else "qat.initialize_scales"
        raise UsageError(
            f"scales of {site.name} are not initialized; "
            f"call {function}(net, batches) or load a checkpoint"
        )
    for module in net.modules():
        hooks = module._forward_pre_hooks
        for key, hook in list(hooks.items()):
            if hook is _check_before_forward:
                hooks.pop(key, None)


def _check_has_values(net: nn.Module) -> None:
    """Raise `UsageError` for the first tensor on the meta device."""
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        if tensor.is_meta:
            raise UsageError(
                f"{name}: is on the meta device, so it has no values; "
                "call load_state_dict(state, assign=True) for tensors in a state dict, "
                "and build the model on a device for all others"
            )


def check_finite(net: nn.Module, origin: str, *, unset: bool = False) -> None:
    """Raise `UsageError` if a tensor of a model is NaN or infinite.

    Args:
        net: a converted or float model.
        origin: name of the model in an error, such as `ckpt='x.pt'`.
        unset: True = allow scales that were never set, which are NaN.
    """
    scale_ids = set()
    for site in iter_quantizers(net):
        for tensor in (*site.quantizer.parameters(), *site.quantizer.buffers()):
            scale_ids.add(id(tensor))
    for name, tensor in net.state_dict(keep_vars=True).items():
        is_scale = id(tensor) in scale_ids
        is_damaged = tensor.isinf() if is_scale and unset else ~tensor.isfinite()
        if is_damaged.any():
            kind = "weight" if isinstance(tensor, nn.Parameter) else "buffer"
            raise UsageError(
                f"{origin}: {kind} {name} is NaN or infinite: "
                "the run diverged, or scales were never initialized"
            )


def guard(net: nn.Module) -> None:
    """Make calls of `net` raise an error until all scales are set.

    `assert_ready`, or the first call with all scales set, removes the guard. Loading a state dict
    whose scales are not set (NaN) restores the guard. The guard does not check calls within
    `allow_unset_scales`, of single quantizers or layers, or of compiled or exported graphs.
    """
    if any(site.quantizer.state_dict() for site in iter_quantizers(net)):
        net.register_forward_pre_hook(_check_before_forward, prepend=True)
        net.register_load_state_dict_post_hook(_check_after_load)


def _check_after_load(net: nn.Module, _: Any) -> None:
    has_guard = _check_before_forward in net._forward_pre_hooks.values()
    if not has_guard and not all(is_ready(site.quantizer) for site in iter_quantizers(net)):
        net.register_forward_pre_hook(_check_before_forward, prepend=True)


def _check_before_forward(net: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or unset_scales_allowed.get():
        return
    if args and isinstance(args[0], Tensor) and not args[0].is_meta:
        _check_has_values(net)
    # Fake tensors and tensors on the meta device have no values to check.
    with contextlib.suppress(RuntimeError):
        assert_ready(net)


class _Progress:
    """Logs the progress of calibration every ten seconds."""

    def __init__(self, quantizers: int) -> None:
        self.quantizers = quantizers
        self.images = 0
        self.calibrated = 0
        self.began = time.monotonic()
        self.last = self.began

    def begin_batch(self, images: int) -> None:
        """Add the images of a batch to the count, and begin to count quantizers again."""
        self.images += images
        self.calibrated = 0

    def calibrate(self, state: dict[str, Any], quantizer: Any, args: tuple[Tensor, ...]) -> None:
        """Calibrate a quantizer with one input. With `state` bound, this is a forward pre-hook."""
        quantizer.calibrate(args[0], state)
        self.calibrated += 1
        now = time.monotonic()
        if now - self.last < LOG_EVERY_S:
            return
        self.last = now
        # By default, Python does not print log messages of lower levels.
        log.warning(
            "initialize_scales: %.0f s, %d images, %d of %d quantizers",
            now - self.began,
            self.images,
            self.calibrated,
            self.quantizers,
        )


def _first_images(batches: Iterable[Any], net: nn.Module, max_images: int) -> Iterator[Tensor]:
    """Yield the images of each batch, at most `max_images` in total; later batches are not read."""
    images_left = max_images
    for batch in batches:
        images = calibration_images(batch, net)[:images_left]
        images_left -= len(images)
        yield images
        if not images_left:
            return


def initialize_scales(
    net: nn.Module, batches: Iterable[Any], *, max_images: int = 256
) -> nn.Module:
    """Set every scale that is still NaN, from the quantizer's inputs on some images.

    Earlier quantizers in the model already act on these inputs. Scales that are already set do not
    change. With one batch and `step_init=lsq`, the result is that of OFQ's code. With several
    batches, statistics are averaged over batches, and minima and maxima are joined.

    Args:
        net: a converted model. It runs in eval mode; its mode is restored afterwards.
        batches: images (B, C, H, W), or pairs (images, labels) as from a loader; they are moved to
            the model's device.
        max_images: maximum number of images to use.

    Returns:
        `net` itself.

    Raises:
        UsageError: there is no batch, a batch does not contain finite float images, `max_images` is
            below 1, a quantizer gets no input or needs `qat.ptq.calibrate`, or the model is on the
            meta device.
    """
    _check_has_values(net)
    pending = [site.quantizer for site in iter_quantizers(net) if not is_ready(site.quantizer)]
    if not pending:
        return net
    check_int("max_images", max_images, 1)
    unset_states = [copy.deepcopy(quantizer.state_dict()) for quantizer in pending]
    progress = _Progress(len(pending))
    hooks = []
    for quantizer in pending:
        state: dict[str, Any] = {}
        calibrate = functools.partial(progress.calibrate, state)
        hooks.append(quantizer.register_forward_pre_hook(calibrate))
    try:
        with probing(net, hooks):
            for images in _first_images(batches, net, max_images):
                progress.begin_batch(len(images))
                net(images)
            if not progress.images:
                raise UsageError("batches: must contain at least one batch of images")
            assert_ready(net)
    except BaseException:
        # Otherwise, scales from only a few batches would look like the result of all batches.
        for quantizer, state in zip(pending, unset_states, strict=True):
            quantizer.load_state_dict(state)
        raise
    return net
