"""How often weight codes flip while training. Sources: Nagel et al., arXiv 2203.11086; OFQ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from qat.callbacks.common import logs_now, net_of, track
from qat.errors import UsageError
from qat.functional.confidence import check_boundary
from qat.functional.oscillation import OscillationState
from qat.model.sites import Site, iter_quantizers
from qat.utils.files import csv_text, write_text
from qat.utils.validate import check_int, check_number

log = logging.getLogger(__name__)

FILE = "oscillation.csv"


class Oscillation(Callback):
    """Tracks the codes of weights before every n-th optimizer step; 6 bytes for each tracked weight.

    Logs `osc/share` of weights that oscillate, `osc/band` = share near a threshold, the mean `osc/frequency`, and `osc/flips` so far. The
    end of the run writes a table with a row for each layer.

    Args:
        momentum: weight of one look in the frequency, above 0 to below 1.
        threshold: a weight oscillates if its frequency is above it.
        boundary_range: half-width of the band that `osc/band` counts, in codes, 0 < value < 0.5.
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
        boundary_range: float = 0.005,
        every_n_steps: int = 1,
        max_bits: int = 4,
        dirpath: str | None = None,
    ) -> None:
        check_number("callbacks.oscillation.momentum", momentum, 0, above=True, below=1)
        check_number("callbacks.oscillation.threshold", threshold, 0)
        check_boundary("callbacks.oscillation.boundary_range", boundary_range)
        check_int("callbacks.oscillation.every_n_steps", every_n_steps, 1)
        check_int("callbacks.oscillation.max_bits", max_bits, 2)
        self.momentum, self.threshold, self.boundary_range = momentum, threshold, boundary_range
        self.every_n_steps, self.max_bits, self.dirpath = every_n_steps, max_bits, dirpath
        self._sites: list[Site] = []
        self._states: dict[str, OscillationState] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights."""
        if stage != "fit":
            return
        self._states = {}
        self._sites = [s for s in iter_quantizers(net_of(pl_module)) if s.is_weight and s.quantizer.spec.bits <= self.max_bits]
        if not self._sites:
            raise UsageError(f"callbacks.oscillation.max_bits={self.max_bits}: this net has no quantized weights of so few bits")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Look at the codes of the forward pass that was."""
        if trainer.global_step % self.every_n_steps == 0:
            for site in self._sites:
                self._states[site.name] = track(self._states.get(site.name), site.quantizer.codes(site.latent()), self.momentum)
        if logs_now(trainer) and self._states:
            n, oscillating, frequency, near, flips = torch.stack([counts for _, counts in self._measured()]).sum(0)
            values = {"osc/share": oscillating / n, "osc/frequency": frequency / n, "osc/band": near / n, "osc/flips": flips}
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    @torch.no_grad()
    def _measured(self) -> list[tuple[Site, Tensor]]:
        """Of each site: weights, how many of them oscillate, sum of their frequencies, how many are in the band, flips; (5,) float32."""
        found = []
        for site in [s for s in self._sites if s.name in self._states]:
            weight, state = site.latent().detach(), self._states[site.name]
            grid = site.quantizer.grid(weight)
            near = torch.zeros_like(weight, dtype=torch.bool) if grid is None else grid.near_threshold(weight, self.boundary_range)
            sums = (state.frequency > self.threshold).sum(), state.frequency.sum(), near.sum(), state.flips
            found.append((site, torch.stack([torch.full_like(sums[1], weight.numel()), *(s.to(weight.device).float() for s in sums)])))
        return found

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, log the totals."""
        if not (trainer.is_global_zero and self._states):
            return
        rows: list[dict[str, Any]] = []
        for site, counts in self._measured():
            n, oscillating, frequency, near, flips = counts.tolist()
            row = {"layer": site.layer, "role": site.role, "bits": site.quantizer.spec.bits, "weights": int(n)}
            rows.append(row | {"oscillating": int(oscillating), "in_band": int(near), "flips": int(flips), "mean_frequency": frequency / n})
        total = {"layer": "total", "bits": "", **{k: sum(row[k] for row in rows) for k in ("weights", "oscillating", "in_band", "flips")}}
        total["mean_frequency"] = sum(row["mean_frequency"] * row["weights"] for row in rows) / total["weights"]
        share, near = (100 * total[key] / total["weights"] for key in ("oscillating", "in_band"))
        log.info("oscillation: %.2f %% of %d weights oscillate, %.2f %% are near a threshold", share, total["weights"], near)
        if self.dirpath is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_text(Path(self.dirpath) / FILE, csv_text([*rows, total]))

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {"weights": {name: state._asdict() for name, state in self._states.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        states = state_dict["weights"]
        is_of_today = all("frequency" in state for state in states.values())  # else of an older version: frequencies begin anew
        self._states = {name: OscillationState(**state) for name, state in states.items()} if is_of_today else {}
