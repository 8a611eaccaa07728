"""Iterative freezing: a weight that oscillates too often keeps one integer from then on. Source: Nagel et al., arXiv 2203.11086."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.callbacks.common import logs_now, net_of, track, weight_of
from qat.errors import UsageError
from qat.functional.oscillation import FreezingState, OscillationState, cosine_between, freezing_step, with_frozen
from qat.model.entry_freezer import EntryFreezer
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import UniformGrid
from qat.utils.validate import check_int, check_number

# A frozen latent that strays further from the middle of its cell than this, in codes, is put back there; the cell ends at 0.5.
_STRAY = 0.25


class IterativeFreezing(Callback):
    """Freezes weights whose code oscillates more often than a threshold that falls along a cosine.

    A code is always that of its latent weight, so the latent of a frozen weight is put in the middle of the cell of its integer, held
    there through every step (`EntryFreezer`), and put back when the step size moves the cell away. As in the authors' code, what a look
    finds takes effect in the next forward. The folded matrix of QKR has no latent of its own and is left alone.

    Args:
        threshold: on the oscillation frequency, at the start; above 0.
        final_threshold: at the end of the run; two to three times `momentum` at least catches only repeated flips.
        momentum: of the frequency and of the mean code.
        max_bits: weights of more bits are left alone.

    Raises:
        UsageError: a setting cannot work. In `setup`: there is nothing to freeze.
    """

    needs_whole_weights = True

    def __init__(self, threshold: float = 0.1, final_threshold: float = 0.01, momentum: float = 0.01, max_bits: int = 4) -> None:
        check_number("callbacks.freeze.threshold", threshold, 0, above=True)
        check_number("callbacks.freeze.final_threshold", final_threshold, 0, above=True)
        check_number("callbacks.freeze.momentum", momentum, 0, above=True, below=1)
        check_int("callbacks.freeze.max_bits", max_bits, 2)
        self.threshold, self.final_threshold, self.momentum, self.max_bits = threshold, final_threshold, momentum, max_bits
        self._steps = math.inf
        self._sites: list[Site] = []
        self._codes: dict[str, OscillationState] = {}
        self._frozen: dict[str, FreezingState] = {}
        self._freezer = EntryFreezer(after=self._center)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights."""
        if stage != "fit":
            return
        self._codes, self._frozen = {}, {}
        found = [site for site in iter_quantizers(net_of(pl_module)) if site.role == "weight" and site.quantizer.spec.bits <= self.max_bits]
        self._sites = [site for site in found if isinstance(site.quantizer.grid(site.latent().detach()), UniformGrid)]
        if not self._sites:
            raise UsageError(f"callbacks.freeze.max_bits={self.max_bits}: this net has no weights on evenly spaced values of so few bits")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook into the optimizer's step, and count the steps of the run."""
        self._freezer.attach(trainer.optimizers)
        self._steps = max(trainer.estimated_stepping_batches, 1)

    def threshold_at(self, step: int) -> float:
        """Threshold at an optimizer step, along a cosine."""
        return cosine_between(self.threshold, self.final_threshold, step / self._steps)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Look at the codes of the forward pass that was, freeze, and hold what is frozen through the step."""
        threshold = self.threshold_at(trainer.global_step)
        frozen: list[tuple[nn.Parameter, Tensor]] = []
        for site in self._sites:
            weight, before = weight_of(site), self._frozen.get(site.name)
            before = None if before is None else FreezingState(*(t.to(weight.device) for t in before))  # a checkpoint's are on the CPU
            codes = with_frozen(before, site.quantizer.codes(weight))
            seen = self._codes[site.name] = track(self._codes.get(site.name), codes, self.momentum)
            state = freezing_step(before, codes, seen.frequency, threshold, self.momentum)
            if state is not None:
                self._frozen[site.name] = state._replace(codes=state.codes.to(torch.int8))
                frozen.append((weight, state.frozen))
        self._freezer.freeze(frozen)
        if logs_now(trainer) and frozen:
            share = torch.stack([mask.sum() for _, mask in frozen]).sum() / sum(mask.numel() for _, mask in frozen)
            values = {
                "freeze/frozen": share,
                "freeze/threshold": torch.full_like(share, threshold),
            }  # a number would be copied, which waits
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    @torch.no_grad()
    def _center(self) -> None:
        """Put frozen latents that strayed back into the middle of their cells."""
        for site in [one for one in self._sites if one.name in self._frozen]:
            weight, state = weight_of(site), self._frozen[site.name]
            grid = cast(UniformGrid, site.quantizer.grid(weight))
            strayed = state.frozen & ((grid.to_code_coordinates(weight) - state.codes).abs() > _STRAY)
            weight.copy_(torch.where(strayed, grid.dequantize(state.codes).to(weight.dtype), weight))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook."""
        self._freezer.detach()

    def state_dict(self) -> dict[str, Any]:
        """Codes, frequencies and frozen integers of every weight: 12 bytes for each of its entries."""
        return {"codes": {k: v._asdict() for k, v in self._codes.items()}, "frozen": {k: v._asdict() for k, v in self._frozen.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._codes = {name: OscillationState(**state) for name, state in state_dict["codes"].items()}
        self._frozen = {name: FreezingState(**state) for name, state in state_dict["frozen"].items()}
