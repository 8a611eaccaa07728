"""How often weight codes flip while training, and activation codes between validations. Sources: Nagel et al., arXiv 2203.11086; OFQ."""

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
from qat.utils.probing import probing
from qat.utils.validate import check_int, check_number

log = logging.getLogger(__name__)

FILE = "oscillation.csv"


class Oscillation(Callback):
    """Tracks the codes of weights before every n-th optimizer step, and of activations on one batch at every validation.

    Logs, by layer and in total: `osc/share` of weights that oscillate, `osc/band` = share near a threshold; in total the mean
    `osc/frequency`, and `osc/flips` so far; by site and as their mean: `osc/act_flipped` = share of activation codes that differ
    from the validation before. The end of the run writes a table.

    Memory: 6 bytes for each tracked weight, and one for each activation code of the probe.

    Args:
        momentum: weight of one look in the frequency, above 0 to below 1.
        threshold: a weight oscillates if its frequency is above it.
        boundary_range: half-width of the band that `osc/band` counts, in codes, 0 < value < 0.5.
        every_n_steps: optimizer steps between looks.
        max_bits: weights of more bits are not tracked.
        probe_images: images of the first validation batch whose activation codes are compared; 0 = none.
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
        probe_images: int = 4,
        dirpath: str | None = None,
    ) -> None:
        check_number("callbacks.oscillation.momentum", momentum, 0, above=True, below=1)
        check_number("callbacks.oscillation.threshold", threshold, 0)
        check_boundary("callbacks.oscillation.boundary_range", boundary_range)
        check_int("callbacks.oscillation.every_n_steps", every_n_steps, 1)
        check_int("callbacks.oscillation.max_bits", max_bits, 2)
        check_int("callbacks.oscillation.probe_images", probe_images, 0)
        self.momentum, self.threshold, self.boundary_range = momentum, threshold, boundary_range
        self.every_n_steps, self.max_bits, self.probe_images, self.dirpath = every_n_steps, max_bits, probe_images, dirpath
        self._sites: list[Site] = []
        self._states: dict[str, OscillationState] = {}
        self._activations: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights."""
        if stage != "fit":
            return
        self._states, self._activations = {}, {}
        self._sites = [s for s in iter_quantizers(net_of(pl_module)) if s.is_weight and s.quantizer.spec.bits <= self.max_bits]
        if not self._sites:
            raise UsageError(f"callbacks.oscillation.max_bits={self.max_bits}: this net has no quantized weights of so few bits")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Look at the codes of the forward pass that was."""
        if trainer.global_step % self.every_n_steps == 0:
            for site in self._sites:
                self._states[site.name] = track(self._states.get(site.name), site.quantizer.codes(site.latent()), self.momentum)
        if not (logs_now(trainer) and self._states):
            return
        measured = self._measured()
        values: dict[str, Tensor] = {}
        for site, (n, oscillating, _, near, _) in measured:
            values |= {f"osc/share/{site.layer}": oscillating / n, f"osc/band/{site.layer}": near / n}
        n, oscillating, frequency, near, flips = torch.stack([counts for _, counts in measured]).sum(0)
        totals = {"osc/share": oscillating / n, "osc/frequency": frequency / n, "osc/band": near / n, "osc/flips": flips}
        pl_module.log_dict({**values, **totals}, on_step=True, on_epoch=False)

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

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Compare the activation codes of the probe with those of the validation before."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or batch_idx or dataloader_idx or not self.probe_images:
            return
        net, images, codes = net_of(pl_module), batch[0][: self.probe_images], {}

        def note(site: Site, args: tuple[Tensor, ...]) -> None:
            codes[site.name] = site.quantizer.codes(args[0].detach())[: len(images)].clone().cpu()

        hooks = [
            site.quantizer.register_forward_pre_hook(lambda _, args, site=site: note(site, args))
            for site in iter_quantizers(net)
            if not site.is_weight and not site.quantizer.is_float
        ]
        with probing(net, hooks), trainer.precision_plugin.val_step_context():
            net.forward(images)  # not compiled: a compiled graph knows no hooks
        pairs = {name: (now, self._activations.get(name)) for name, now in codes.items()}
        shares = {name: (now != old).float().mean() for name, (now, old) in pairs.items() if old is not None and old.shape == now.shape}
        self._activations = codes
        if shares:
            values = {f"osc/act_flipped/{name}": share for name, share in shares.items()}
            values["osc/act_flipped"] = torch.stack(list(shares.values())).mean()
            # Each process has a probe of its own, and the first one's is logged. `sync_dist` keeps Lightning from advising it.
            pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=True, sync_dist=True)

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
        return {"weights": {name: state._asdict() for name, state in self._states.items()}, "activations": dict(self._activations)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        states = state_dict["weights"]
        if any("frequency" not in state for state in states.values()):
            log.warning("resume: callbacks.oscillation: an older version wrote what was tracked; frequencies begin anew")
            states = {}
        self._states = {name: OscillationState(**state) for name, state in states.items()}
        self._activations = dict(state_dict["activations"])
