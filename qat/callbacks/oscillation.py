"""How often weight codes flip while training, and freezing those that flip too often. Sources: Nagel et al., arXiv 2203.11086; OFQ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.oscillation import (
    FreezingState,
    OscillationState,
    cosine_between,
    freezing_step,
    oscillation_step,
    with_frozen,
)
from qat.model.entry_freezer import EntryFreezer
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import SquashedGrid, UniformGrid
from qat.utils.files import csv_text, write_text
from qat.utils.validate import HIGHEST_BITS, LOWEST_BITS, check_int, check_number

FILE = "oscillation.csv"
BOUNDARY = 0.005  # half-width of the band that `osc/band` counts, in codes: that of CGA
MAX_BITS = 4  # weights of more bits are not frozen
# A frozen latent that strays further from the middle of its cell than this, in codes, is put back there; the cell ends at 0.5.
_STRAY = 0.25


def logs_now(trainer: Trainer) -> bool:
    """True if the figures of the step under way are logged."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0


def log_share(
    trainer: Trainer, pl_module: LightningModule, name: str, masks: Sequence[Tensor]
) -> None:
    """Log which share of all entries some masks let through, if this step is logged; nothing waits for the device."""
    if masks and logs_now(trainer):
        share = torch.stack([mask.sum() for mask in masks]).sum() / sum(
            mask.numel() for mask in masks
        )
        pl_module.log(name, share, on_step=True, on_epoch=False)


def track(state: OscillationState | None, codes: Tensor, momentum: float) -> OscillationState:
    """`oscillation_step` with a state of seven bytes an entry: codes in int16, direction in int8, and the sum of flips alone.

    Args:
        state: of the last look, wherever a checkpoint has put it; None before the first.
        codes: of at most 8 bits.
        momentum: weight of this look in the frequency.
    """
    flips: Tensor | int = 0
    if state is not None:
        state = OscillationState(*(t.to(codes.device) for t in state))
        flips, state = state.flips, state._replace(flips=torch.zeros_like(state.frequency))
    seen = oscillation_step(state, codes, momentum)
    flips = flips + seen.flips.sum(dtype=torch.int64)
    return OscillationState(
        seen.codes.to(torch.int16), seen.direction.to(torch.int8), seen.frequency, flips
    )


class Oscillation(Callback):
    """Tracks the codes of weights before every n-th optimizer step; 7 bytes for each tracked weight.

    Logs `osc/share` of weights that oscillate, `osc/band` = share near a threshold, the mean `osc/frequency`, and `osc/flips` so far. The
    end of the run writes a table with a row for each layer.

    Args:
        momentum: weight of one look in the frequency, above 0 to below 1.
        threshold: a weight oscillates if its frequency is above it.
        every_n_steps: optimizer steps between looks.
        max_bits: weights of more bits are not tracked.
        dirpath: folder of `oscillation.csv`; None = no file.

    Raises:
        UsageError: a setting cannot work. In `setup`: there is nothing to track.
    """

    needs_whole_weights = True

    def __init__(
        self,
        momentum: float = 0.01,
        threshold: float = 0.005,
        every_n_steps: int = 1,
        max_bits: int = 4,
        dirpath: str | None = None,
    ) -> None:
        check_number("callbacks.oscillation.momentum", momentum, 0, above=True, below=1)
        check_number("callbacks.oscillation.threshold", threshold, 0, below=1)
        check_int("callbacks.oscillation.every_n_steps", every_n_steps, 1)
        check_int("callbacks.oscillation.max_bits", max_bits, LOWEST_BITS, HIGHEST_BITS)
        self.momentum, self.threshold = momentum, threshold
        self.every_n_steps, self.max_bits, self.dirpath = every_n_steps, max_bits, dirpath
        self._sites: list[Site] = []
        self._states: dict[str, OscillationState] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights."""
        if stage != "fit":
            return
        sites = iter_quantizers(cast(nn.Module, pl_module.net))
        self._sites = [
            s
            for s in sites
            if s.is_weight and s.quantizer.spec.bits <= self.max_bits and not s.quantizer.in_blocks
        ]
        if not self._sites:
            why = f"this model has no quantized weights of at most {self.max_bits} bits, floats in blocks aside"
            raise UsageError(f"callbacks.oscillation.max_bits={self.max_bits}: {why}")

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the codes of the forward pass that was."""
        if trainer.global_step % self.every_n_steps == 0:
            for site in self._sites:
                self._states[site.name] = track(
                    self._states.get(site.name), site.quantizer.codes(site.latent()), self.momentum
                )
        if logs_now(trainer) and self._states:
            n, oscillating, frequency, near, flips = torch.stack([
                counts for _, counts in self._measured()
            ]).sum(0)
            values = {
                "osc/share": oscillating / n,
                "osc/frequency": frequency / n,
                "osc/band": near / n,
                "osc/flips": flips,
            }
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    @torch.no_grad()
    def _measured(self) -> list[tuple[Site, Tensor]]:
        """Of each site: weights, how many of them oscillate, sum of their frequencies, how many are in the band, flips; (5,) float32."""
        found = []
        for site in [s for s in self._sites if s.name in self._states]:
            weight, state = site.latent().detach(), self._states[site.name]
            grid = site.quantizer.grid(weight)
            near = (
                torch.zeros_like(weight, dtype=torch.bool)
                if grid is None
                else grid.near_threshold(weight, BOUNDARY)
            )
            sums = (
                (state.frequency > self.threshold).sum(),
                state.frequency.sum(),
                near.sum(),
                state.flips,
            )
            found.append((
                site,
                torch.stack([
                    torch.full_like(sums[1], weight.numel()),
                    *(s.to(weight.device).float() for s in sums),
                ]),
            ))
        return found

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, its last row the total."""
        if self.dirpath is None or not (trainer.is_global_zero and self._states):
            return
        sites, counts = zip(*self._measured(), strict=True)
        table = torch.stack(counts).cpu().double()
        rows: list[dict[str, Any]] = [
            {"layer": s.layer, "role": s.role, "bits": s.quantizer.spec.bits} for s in sites
        ]
        rows.append({"layer": "total"})
        for row, numbers in zip(rows, [*table, table.sum(0)], strict=True):
            n, oscillating, frequency, near, flips = numbers.tolist()
            row |= {
                "weights": int(n),
                "oscillating": int(oscillating),
                "in_band": int(near),
                "flips": int(flips),
            }
            row["mean_frequency"] = frequency / n
        write_text(Path(self.dirpath) / FILE, csv_text(rows))

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {"weights": {name: state._asdict() for name, state in self._states.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._states = {
            name: OscillationState(**state) for name, state in state_dict["weights"].items()
        }


class IterativeFreezing(Callback):
    """Freezes weights whose code oscillates more often than a threshold that falls along a cosine.

    A code is always that of its latent weight, so the latent of a frozen weight is put in the middle of the cell of its integer, held
    there through every step (`EntryFreezer`), and put back when the step size moves the cell away. As in the authors' code, what a look
    finds takes effect in the next forward. The folded matrix of QKR has no latent of its own and is left alone.

    Args:
        threshold: on the oscillation frequency, at the start; above 0, below 1.
        final_threshold: at the end of the run; two to three times `momentum` at least catches only repeated flips.
        momentum: of the frequency and of the mean code.

    Raises:
        UsageError: a setting cannot work. In `setup`: there is nothing to freeze.
    """

    needs_whole_weights = True

    def __init__(
        self, threshold: float = 0.1, final_threshold: float = 0.01, momentum: float = 0.01
    ) -> None:
        self.threshold, self.final_threshold, self.momentum = threshold, final_threshold, momentum
        for name in ("threshold", "final_threshold", "momentum"):
            check_number(f"callbacks.freeze.{name}", getattr(self, name), 0, above=True, below=1)
        self._steps = math.inf
        self._sites: list[Site] = []
        self._codes: dict[str, OscillationState] = {}
        self._frozen: dict[str, FreezingState] = {}
        self._freezer = EntryFreezer(after=self._center)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights."""
        if stage != "fit":
            return
        sites = iter_quantizers(cast(nn.Module, pl_module.net))
        found = (
            site for site in sites if site.role == "weight" and site.quantizer.spec.bits <= MAX_BITS
        )
        grids = [(site, site.quantizer.grid(site.latent().detach())) for site in found]
        self._sites = [
            site
            for site, grid in grids
            if isinstance(grid, UniformGrid) and not isinstance(grid, SquashedGrid)
        ]
        if not self._sites:
            raise UsageError(
                f"callbacks.freeze: this model has no weights of up to {MAX_BITS} bits on a uniform grid"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook into the optimizer's step, and count the steps of the run."""
        self._freezer.attach(trainer.optimizers)
        self._steps = max(trainer.estimated_stepping_batches, 1)

    def threshold_at(self, step: int) -> float:
        """Threshold at an optimizer step, along a cosine."""
        return cosine_between(self.threshold, self.final_threshold, step / self._steps)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the codes of the forward pass that was, freeze, and hold what is frozen through the step."""
        threshold = self.threshold_at(trainer.global_step)
        frozen: list[tuple[Tensor, Tensor]] = []
        for site in self._sites:
            weight, state = site.latent(), self._frozen.get(site.name)
            if state is not None:
                state = FreezingState(
                    *(t.to(weight.device) for t in state)
                )  # a checkpoint's are on the CPU
            codes = with_frozen(state, site.quantizer.codes(weight))
            seen = self._codes[site.name] = track(self._codes.get(site.name), codes, self.momentum)
            state = freezing_step(state, codes, seen.frequency, threshold, self.momentum)
            if state is not None:
                self._frozen[site.name] = state._replace(codes=state.codes.to(torch.int8))
                frozen.append((weight, state.frozen))
        self._freezer.freeze(frozen)
        log_share(trainer, pl_module, "freeze/frozen", [mask for _, mask in frozen])

    @torch.no_grad()
    def _center(self) -> None:
        """Put frozen latents that strayed back into the middle of their cells."""
        for site in self._sites:
            weight, state = site.latent(), self._frozen[site.name]
            grid = cast(UniformGrid, site.quantizer.grid(weight))
            strayed = state.frozen & (
                (grid.to_code_coordinates(weight) - state.codes).abs() > _STRAY
            )
            weight.copy_(
                torch.where(strayed, grid.dequantize(state.codes).to(weight.dtype), weight)
            )

    def state_dict(self) -> dict[str, Any]:
        """Codes, frequencies and frozen integers of every weight: 13 bytes for each of its entries."""
        return {
            "codes": {k: v._asdict() for k, v in self._codes.items()},
            "frozen": {k: v._asdict() for k, v in self._frozen.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._codes = {
            name: OscillationState(**state) for name, state in state_dict["codes"].items()
        }
        self._frozen = {
            name: FreezingState(**state) for name, state in state_dict["frozen"].items()
        }
