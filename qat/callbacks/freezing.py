"""Freeze weights whose codes flip too often. Source: Nagel et al., arXiv 2203.11086."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.callbacks.oscillation import log_fraction, track_codes
from qat.errors import UsageError
from qat.functional.oscillation import (
    FreezingState,
    OscillationState,
    cosine_between,
    freezing_step,
    replace_frozen,
)
from qat.model.entry_freezer import EntryFreezer
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import SquashedGrid, UniformGrid
from qat.utils.validate import check_number

MAX_BITS = 4  # weights of more bits are not frozen
# Maximum distance of a frozen latent weight from the middle of its cell, in codes; the cell ends at
# a distance of 0.5.
_MAX_DRIFT = 0.25


class IterativeFreezing(Callback):
    """Freezes weights that oscillate more often than a threshold, which follows a cosine.

    A code is always computed from its latent weight. Therefore, a step does not change the latent
    weight of a frozen entry (`EntryFreezer`). If this weight is more than a quarter of a code from
    the middle of its cell (the values that round to its code), for example after a change of the
    step size, it is moved to the middle. As in the authors' code, freezing takes effect in the next
    forward pass. Weights of DoReFa, of non-uniform grids or of more than 4 bits, and the folded
    matrix of query-key reparameterization, are not frozen.

    Args:
        threshold: oscillation frequency above which a weight is frozen, at the start of the run;
            above 0, below 1.
        final_threshold: threshold at the planned end of the run, above 0, below 1; at twice
            `momentum` or more, only repeated flips exceed it.
        momentum: weight of one step in the frequency and in the mean code.

    Raises:
        UsageError: a setting is invalid. In `setup`: there is nothing to freeze.
    """

    needs_whole_weights = True

    def __init__(
        self, threshold: float = 0.1, final_threshold: float = 0.01, momentum: float = 0.01
    ) -> None:
        self.threshold = threshold
        self.final_threshold = final_threshold
        self.momentum = momentum
        for name in ("threshold", "final_threshold", "momentum"):
            check_number(
                f"callbacks.freeze.{name}", getattr(self, name), 0, exclusive_lowest=True, below=1
            )
        self._num_steps = math.inf
        self._sites: list[Site] = []
        self._oscillation_states: dict[str, OscillationState] = {}
        self._freezing_states: dict[str, FreezingState] = {}
        self._freezer = EntryFreezer(on_restore=self._move_to_cell_centers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights to freeze; a new run begins without frozen weights."""
        if stage != "fit":
            return
        if not trainer.global_step:
            self._oscillation_states.clear()
            self._freezing_states.clear()
        sites = iter_quantizers(cast(nn.Module, pl_module.net))
        self._sites = [site for site in sites if _can_freeze(site)]
        if not self._sites:
            raise UsageError(
                "callbacks.freeze: "
                f"this model has no weights of up to {MAX_BITS} bits on a uniform grid; "
                "leave the callback out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook into the optimizer's step, and count the steps of the run."""
        self._freezer.attach(trainer.optimizers)
        self._num_steps = max(trainer.estimated_stepping_batches, 1)

    def threshold_at(self, step: int) -> float:
        """Threshold at an optimizer step, along a cosine."""
        return cosine_between(self.threshold, self.final_threshold, step / self._num_steps)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Freeze entries by the codes of the last forward pass; keep frozen entries unchanged."""
        threshold = self.threshold_at(trainer.global_step)
        weights_and_masks: list[tuple[Tensor, Tensor]] = []
        for site in self._sites:
            weight = site.latent()
            state = self._freezing_states.get(site.name)
            if state is not None:  # on the CPU after loading a checkpoint
                state = FreezingState(*(tensor.to(weight.device) for tensor in state))
            codes = replace_frozen(state, site.quantizer.codes(weight))
            oscillation = track_codes(self._oscillation_states.get(site.name), codes, self.momentum)
            self._oscillation_states[site.name] = oscillation
            state = freezing_step(state, codes, oscillation.frequency, threshold, self.momentum)
            if state is not None:
                self._freezing_states[site.name] = state._replace(codes=state.codes.to(torch.int8))
                weights_and_masks.append((weight, state.frozen))
        self._freezer.freeze(weights_and_masks)
        log_fraction(trainer, pl_module, "freeze/frozen", [mask for _, mask in weights_and_masks])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the hook, because Lightning does not call `teardown` after an exception."""
        self._freezer.detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook."""
        self._freezer.detach()

    @torch.no_grad()
    def _move_to_cell_centers(self) -> None:
        """Move frozen latent weights back to the middle of their cells if they have drifted."""
        for site in self._sites:
            weight = site.latent()
            state = self._freezing_states[site.name]
            grid = cast(UniformGrid, site.quantizer.grid(weight))
            drift = (grid.to_code_coordinates(weight) - state.codes).abs()
            has_drifted = state.frozen & (drift > _MAX_DRIFT)
            center = grid.dequantize(state.codes).to(weight.dtype)
            weight.copy_(torch.where(has_drifted, center, weight))

    def state_dict(self) -> dict[str, Any]:
        """Oscillation and freezing states of every weight: 13 bytes for each entry."""
        return {
            "codes": {name: state._asdict() for name, state in self._oscillation_states.items()},
            "frozen": {name: state._asdict() for name, state in self._freezing_states.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the oscillation and freezing states."""
        self._oscillation_states = {
            name: OscillationState(**state) for name, state in state_dict["codes"].items()
        }
        self._freezing_states = {
            name: FreezingState(**state) for name, state in state_dict["frozen"].items()
        }


def _can_freeze(site: Site) -> bool:
    if site.role != "weight" or site.quantizer.spec.bits > MAX_BITS:
        return False
    grid = site.quantizer.grid(site.latent().detach())
    return isinstance(grid, UniformGrid) and not isinstance(grid, SquashedGrid)
