"""Fill the scales of a converted net from data, and say which are missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from qat.errors import UsageError
from qat.probing import probing
from qat.quantizers import Quantizer
from qat.sites import iter_quantizers


def is_ready(quantizer: Quantizer) -> bool:
    """True if no parameter or buffer of the quantizer holds a NaN."""
    return not any(bool(t.isnan().any()) for t in (*quantizer.parameters(), *quantizer.buffers()) if t.is_floating_point())


def assert_ready(net: nn.Module) -> None:
    """Raise `UsageError` naming the first quantizer whose scales were never filled."""
    for site in iter_quantizers(net):
        if not is_ready(site.quantizer):
            raise UsageError(f"scales of {site.name} are not initialised; call qat.initialize_scales(net, batches) or load a checkpoint")


def initialize_scales(net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set every scale that is still NaN, each quantizer seeing its input behind the quantizers in front of it.

    Scales that hold numbers already (from a checkpoint) stay. With one batch the result is the reference's rule; with several,
    statistics are averaged (min-max: joined) over them.

    Args:
        net: a converted net; runs in eval mode, its mode is restored.
        batches: images (B, C, H, W) each, moved to the net's device.

    Returns:
        `net` itself.

    Raises:
        UsageError: no batch, images that are not finite, or a quantizer that no batch reached; no scale is set then.
    """
    pending = [site.quantizer for site in iter_quantizers(net) if not is_ready(site.quantizer)]
    if not pending:
        return net
    device = next(net.parameters()).device
    with _all_or_none(pending), probing(net, [quantizer.register_forward_pre_hook(_calibrating({})) for quantizer in pending]):
        for batch in batches:
            if not batch.isfinite().all():
                raise UsageError("calibration images hold NaN or infinity; look at data.mean, data.std and the files")
            net(batch.to(device))
        assert_ready(net)
    return net


@contextlib.contextmanager
def _all_or_none(quantizers: Sequence[Quantizer]) -> Generator[None]:
    """Empty scales again where some of the images failed: half of them would count as ready."""
    before = [{name: tensor.clone() for name, tensor in quantizer.state_dict().items()} for quantizer in quantizers]
    try:
        yield
    except BaseException:
        for quantizer, state in zip(quantizers, before, strict=True):
            quantizer.load_state_dict(state)
        raise


def _calibrating(state: dict[str, Any]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Quantizer)  # noqa: S101  (narrows a type)
        module.calibrate(args[0], state)

    return hook
