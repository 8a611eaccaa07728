"""Count how often weight codes flip during training.

Sources: Nagel et al., arXiv 2203.11086; OFQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.oscillation import OscillationState, oscillation_step
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import FloatGrid
from qat.utils.files import csv_text, write_text
from qat.utils.validate import MAX_BITS, MIN_BITS, check_int, check_number

FILE = "oscillation.csv"
BOUNDARY = 0.005  # half-width of the band around thresholds for `osc/band`, in codes, as in CGA


def is_logging_step(trainer: Trainer) -> bool:
    """True if the metrics of the current step are logged."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return interval > 0 and (trainer.global_step + 1) % interval == 0


def log_fraction(
    trainer: Trainer, pl_module: LightningModule, name: str, masks: Sequence[Tensor]
) -> None:
    """Log the fraction of true entries over several masks, without waiting for the device.

    Do nothing without masks, or in steps that are not logged.
    """
    if masks and is_logging_step(trainer):
        num_true = torch.stack([mask.sum() for mask in masks]).sum()
        fraction = num_true / sum(mask.numel() for mask in masks)
        pl_module.log(name, fraction, on_step=True, on_epoch=False)


def track_codes(state: OscillationState | None, codes: Tensor, momentum: float) -> OscillationState:
    """Call `oscillation_step`, and store its state in seven bytes per entry.

    Codes are int16 and directions int8; only the sum of the flips is stored.

    Args:
        state: result of the previous update, on any device; None before the first update.
        codes: codes of the weights, at most 8 bits.
        momentum: weight of this update in the frequency.
    """
    flips: Tensor | int = 0
    if state is not None:
        state = OscillationState(*(tensor.to(codes.device) for tensor in state))
        flips = state.flips
        # Count only the flips of this update; they are added to the sum below.
        state = state._replace(flips=torch.zeros_like(state.frequency))
    state = oscillation_step(state, codes, momentum)
    flips = flips + state.flips.sum(dtype=torch.int64)
    return OscillationState(
        state.codes.to(torch.int16), state.direction.to(torch.int8), state.frequency, flips
    )


class _Sums(NamedTuple):
    """Sums over the entries of one weight, or of all weights: int64, but for `frequency`."""

    entries: Tensor
    oscillating: Tensor
    frequency: Tensor
    in_band: Tensor
    flips: Tensor


def _add(sums: Sequence[_Sums]) -> _Sums:
    return _Sums(*(torch.stack(values).sum() for values in zip(*sums, strict=True)))


class Oscillation(Callback):
    """Tracks the codes of weights before every n-th optimizer step, in 7 bytes per entry.

    The callback logs `osc/share`, the fraction of oscillating weights, `osc/band`, the fraction
    near a decision threshold, `osc/frequency`, the mean frequency, and `osc/flips`, the flips so
    far. At the end of the run, the callback writes a table with a row for each layer.

    Args:
        momentum: weight of one update in the frequency, above 0 to below 1.
        threshold: a weight oscillates if its frequency is above this value.
        every_n_steps: optimizer steps between updates.
        max_bits: weights of more bits, or in low-bit float formats, are not tracked.
        dirpath: folder of `oscillation.csv`; None = no file.

    Raises:
        UsageError: a setting is invalid. In `setup`: there is nothing to track.
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
        check_number("callbacks.oscillation.momentum", momentum, 0, exclusive_lowest=True, below=1)
        check_number("callbacks.oscillation.threshold", threshold, 0, below=1)
        check_int("callbacks.oscillation.every_n_steps", every_n_steps, 1)
        check_int("callbacks.oscillation.max_bits", max_bits, MIN_BITS, MAX_BITS)
        self.momentum = momentum
        self.threshold = threshold
        self.every_n_steps = every_n_steps
        self.max_bits = max_bits
        self.dirpath = dirpath
        self._sites: list[Site] = []
        self._states: dict[str, OscillationState] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights to track; a new run begins without statistics."""
        if stage != "fit":
            return
        if not trainer.global_step:
            self._states.clear()
        sites = iter_quantizers(cast(nn.Module, pl_module.net))
        self._sites = [site for site in sites if self._can_track(site)]
        if not self._sites:
            raise UsageError(
                f"callbacks.oscillation.max_bits={self.max_bits}: this model has no quantized "
                f"weights of at most {self.max_bits} bits, not counting low-bit float formats; "
                "set a higher max_bits, or leave the callback out"
            )

    def _can_track(self, site: Site) -> bool:
        if not site.is_weight or site.quantizer.spec.bits > self.max_bits:
            return False
        return not isinstance(site.quantizer.grid(site.latent()), FloatGrid)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Update the statistics with the current codes, and log them, if due."""
        if trainer.global_step % self.every_n_steps == 0:
            for site in self._sites:
                codes = site.quantizer.codes(site.latent())
                self._states[site.name] = track_codes(
                    self._states.get(site.name), codes, self.momentum
                )
        if is_logging_step(trainer) and self._states:
            totals = _add([self._sum_entries(site) for site in self._tracked_sites()])
            values = {
                "osc/share": totals.oscillating / totals.entries,
                "osc/frequency": totals.frequency / totals.entries,
                "osc/band": totals.in_band / totals.entries,
                "osc/flips": totals.flips.float(),
            }
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def _tracked_sites(self) -> list[Site]:
        return [site for site in self._sites if site.name in self._states]

    @torch.no_grad()
    def _sum_entries(self, site: Site) -> _Sums:
        weight = site.latent().detach()
        state = self._states[site.name]
        grid = site.quantizer.grid(weight)
        in_band = torch.zeros_like(weight, dtype=torch.bool)
        if grid is not None:
            in_band = grid.near_threshold(weight, BOUNDARY)
        sums = _Sums(
            entries=torch.full_like(state.flips, weight.numel()),
            oscillating=(state.frequency > self.threshold).sum(),
            frequency=state.frequency.sum(),
            in_band=in_band.sum(),
            flips=state.flips,
        )
        return _Sums(*(value.to(weight.device) for value in sums))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In the first process, write the table, if any; the last row has the totals."""
        if self.dirpath is None or not self._states or not trainer.is_global_zero:
            return
        sites = self._tracked_sites()
        sums_by_site = [self._sum_entries(site) for site in sites]
        labels: list[dict[str, Any]] = []
        for site in sites:
            bits = site.quantizer.spec.bits
            labels.append({"layer": site.layer, "role": site.role, "bits": bits})
        labels.append({"layer": "total"})
        rows = []
        for label, sums in zip(labels, [*sums_by_site, _add(sums_by_site)], strict=True):
            rows.append({
                **label,
                "weights": int(sums.entries),
                "oscillating": int(sums.oscillating),
                "in_band": int(sums.in_band),
                "flips": int(sums.flips),
                "mean_frequency": float(sums.frequency / sums.entries),
            })
        write_text(Path(self.dirpath) / FILE, csv_text(rows))

    def state_dict(self) -> dict[str, Any]:
        """Statistics so far."""
        return {"weights": {name: state._asdict() for name, state in self._states.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the statistics."""
        self._states = {
            name: OscillationState(**state) for name, state in state_dict["weights"].items()
        }
