"""Iterative freezing: a weight that oscillates too often keeps one integer from then on. Source: Nagel et al., arXiv 2203.11086."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.callbacks.common import logs_now, net_of, parameter_of
from qat.errors import UsageError
from qat.functional.oscillation import FreezingState, OscillationState, cosine_between, freezing_step, oscillation_step, with_frozen
from qat.model.entry_freezer import EntryFreezer
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import UniformGrid
from qat.utils.validate import check_int, check_number

# A frozen latent that strays further from the middle of its cell than this, in codes, is put back there; the cell ends at 0.5.
_STRAY = 0.25


class IterativeFreezing(Callback):
    """Freezes weights whose code oscillates more often than a threshold that falls along a cosine.

    A quantizer knows no frozen integers: a code is always that of its latent weight. So the latent of a frozen weight is put in
    the middle of the cell of its integer and held there through every step (`EntryFreezer`), and put back into the middle when the step
    size moves the cell away from it. Net, checkpoint and export then agree without being told. As in the authors' code, what a
    look finds takes effect in the next forward. The folded matrix of QKR has no latent of its own and is left alone.

    Args:
        threshold: on the oscillation frequency, at the start; above 0.
        final_threshold: at the end of the run; two to three times `momentum` at least catches only repeated flips.
        momentum: of the frequency and of the mean code.
        start_epoch: first epoch in which weights are frozen; the frequency is tracked from the first step on.
        max_bits: weights of more bits are left alone.

    Raises:
        UsageError: a setting cannot work. In `setup`: there is nothing to freeze.
    """

    needs_whole_weights = True

    def __init__(
        self,
        threshold: float = 0.1,
        final_threshold: float = 0.01,
        momentum: float = 0.01,
        start_epoch: int = 0,
        max_bits: int = 4,
    ) -> None:
        check_number("callbacks.freeze.threshold", threshold, 0, above=True)
        check_number("callbacks.freeze.final_threshold", final_threshold, 0, above=True)
        check_number("callbacks.freeze.momentum", momentum, 0, above=True, below=1)
        check_int("callbacks.freeze.start_epoch", start_epoch, 0)
        check_int("callbacks.freeze.max_bits", max_bits, 2)
        self.threshold, self.final_threshold, self.momentum = threshold, final_threshold, momentum
        self.start_epoch, self.max_bits = start_epoch, max_bits
        self._first_step, self._steps = 0.0, math.inf
        self._sites: list[Site] = []
        self._codes: dict[str, OscillationState] = {}
        self._frozen: dict[str, FreezingState] = {}
        self._freezer = EntryFreezer(behind=self._center)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights."""
        if stage != "fit":
            return
        self._codes, self._frozen = {}, {}
        found = [site for site in iter_quantizers(net_of(pl_module)) if site.role == "weight" and site.quantizer.spec.bits <= self.max_bits]
        self._sites = [site for site in found if isinstance(site.quantizer.grid(site.latent().detach()), UniformGrid)]
        if not self._sites:
            raise UsageError(f"callbacks.freeze.max_bits={self.max_bits}: this net has no weights on evenly spaced values of so few bits")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook into the optimizer's step."""
        self._freezer.attach(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps of the run: the loader is set up here."""
        self._steps = trainer.estimated_stepping_batches
        epochs = trainer.max_epochs or 0
        if 0 < epochs <= self.start_epoch:
            raise UsageError(f"callbacks.freeze.start_epoch={self.start_epoch}: must be from 0 to below trainer.max_epochs={epochs}")
        self._first_step = self.start_epoch * self._steps / epochs if epochs > 0 and self._steps < math.inf else 0.0

    def threshold_at(self, step: int) -> float:
        """Threshold at an optimizer step: 0 before the start, then along a cosine."""
        if step < self._first_step:
            return 0.0
        progress = (step - self._first_step) / max(self._steps - self._first_step, 1)
        return cosine_between(self.threshold, self.final_threshold, progress)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Look at the codes of the forward pass that was, freeze, and hold what is frozen through the step."""
        strays: dict[str, Tensor] = {}
        threshold = self.threshold_at(trainer.global_step)
        self._freezer.freeze(self._look(threshold, strays))
        if logs_now(trainer) and strays:
            self._log(pl_module, threshold, strays)

    def _look(self, threshold: float, strays: dict[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every weight with its frozen entries; notes in `strays` how many of those have another code than the frozen one."""
        for site in self._sites:
            name, weight = site.name, parameter_of(site.latent())
            raw, before = site.quantizer.codes(weight), self._state(self._frozen, name, weight)
            codes = with_frozen(before, raw)
            seen = oscillation_step(self._state(self._codes, name, weight), codes, self.momentum)
            state = freezing_step(before, codes, seen.frequency, threshold, self.momentum)
            # One byte where a byte is enough; the flips themselves are the oscillation callback's.
            small = {"codes": codes.to(torch.int8), "direction": seen.direction.to(torch.int8), "flips": weight.new_zeros(())}
            self._codes[name] = seen._replace(**small)
            if state is None:
                continue
            self._frozen[name] = state._replace(codes=state.codes.to(torch.int8))
            strays[name] = codes.new_zeros(()) if before is None else (before.frozen & (raw != codes)).sum()
            yield weight, state.frozen

    @torch.no_grad()
    def _center(self) -> None:
        """Put frozen latents that strayed back into the middle of their cells."""
        for site in self._sites:
            if (state := self._frozen.get(site.name)) is None:
                continue
            weight = parameter_of(site.latent())
            grid = site.quantizer.grid(weight)
            assert grid is not None  # noqa: S101  (narrows a type)
            strayed = state.frozen & ((grid.to_code_coordinates(weight) - state.codes).abs() > _STRAY)
            weight.copy_(torch.where(strayed, grid.dequantize(state.codes).to(weight.dtype), weight))

    @staticmethod
    def _state(states: dict[str, Any], name: str, like: Tensor) -> Any:
        """A state on the device of `like`, where a checkpoint may not have put it."""
        state = states.get(name)
        return None if state is None else type(state)(*(t.to(like.device) for t in state))

    def _log(self, pl_module: LightningModule, threshold: float, strays: dict[str, Tensor]) -> None:
        shares = {s.layer: self._frozen[s.name].frozen for s in self._sites if s.name in self._frozen}
        frozen = torch.stack([mask.sum() for mask in shares.values()]).sum()
        values: dict[str, Any] = {f"freeze/frozen/{layer}": mask.float().mean() for layer, mask in shares.items()}
        values["freeze/frozen"] = frozen / sum(mask.numel() for mask in shares.values())
        values["freeze/strayed"] = torch.stack(list(strays.values())).sum() / frozen.clamp(min=1)
        values["freeze/threshold"] = torch.full((), threshold, device=frozen.device)  # a number would be copied, which waits for the device
        pl_module.log_dict(values, on_step=True, on_epoch=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook."""
        self._freezer.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hook."""
        self._freezer.detach()

    def state_dict(self) -> dict[str, Any]:
        """Codes, frequencies and frozen integers of every weight: 12 bytes for each of its entries."""
        return {"codes": {k: v._asdict() for k, v in self._codes.items()}, "frozen": {k: v._asdict() for k, v in self._frozen.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._codes = {name: OscillationState(**state) for name, state in state_dict["codes"].items()}
        self._frozen = {name: FreezingState(**state) for name, state in state_dict["frozen"].items()}
