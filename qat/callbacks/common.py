"""What callbacks that watch weights share."""

from __future__ import annotations

from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from qat.functional.oscillation import OscillationState, oscillation_step
from qat.model.sites import Site


def net_of(pl_module: LightningModule) -> nn.Module:
    """The net that a module trains: its `net` if it has one."""
    return getattr(pl_module, "net", pl_module)


def weight_of(site: Site) -> nn.Parameter:
    """The latent weight of a site of role `weight`."""
    return cast(nn.Parameter, site.latent())


def logs_now(trainer: Trainer) -> bool:
    """True if the figures of the step under way are logged."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0


def track(state: OscillationState | None, codes: Tensor, momentum: float) -> OscillationState:
    """`oscillation_step` with a state of six bytes an entry: codes and direction in int8, and the sum of flips alone.

    Args:
        state: of the last look, wherever a checkpoint has put it; None before the first.
        codes: of at most 8 bits.
        momentum: weight of this look in the frequency.
    """
    before = None if state is None else OscillationState(*(t.to(codes.device) for t in state))
    seen = oscillation_step(None if before is None else before._replace(flips=torch.zeros_like(before.frequency)), codes, momentum)
    flips = seen.flips.sum(dtype=torch.int64) + (0 if before is None else before.flips)
    return OscillationState(seen.codes.to(torch.int8), seen.direction.to(torch.int8), seen.frequency, flips)
