"""What callbacks that watch weights share."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn


def net_of(pl_module: LightningModule) -> nn.Module:
    """The net that a module trains: its `net` if it has one."""
    return getattr(pl_module, "net", pl_module)


def parameter_of(tensor: Tensor) -> nn.Parameter:
    """The tensor, known to be a parameter.

    Raises:
        TypeError: it is computed from others, so there is nothing to hold in place.
    """
    if not isinstance(tensor, nn.Parameter):
        raise TypeError("the float master of this weight is computed from other tensors, not a parameter")
    return tensor


def logs_now(trainer: Trainer) -> bool:
    """True if the step under way is one whose figures are logged."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0
