"""How often weight codes flip while training, and activation codes between validations. Sources: Nagel et al., arXiv 2203.11086; OFQ."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat.callbacks.common import logs_now, net_of
from qat.errors import UsageError
from qat.functional.confidence import check_boundary
from qat.functional.oscillation import PackedOscillation, oscillation_step, pack_oscillation, unpack_oscillation
from qat.model.sites import Site, iter_quantizers
from qat.utils.files import csv_text, write_text
from qat.utils.probing import probing
from qat.utils.validate import check_int, check_number, check_text

log = logging.getLogger(__name__)

# Below it the 16 bits of a packed frequency no longer hold a whole step of its decay.
_LOWEST_MOMENTUM = 0.0005
FILE = "oscillation.csv"


class ActivationCodes:
    """Codes of every quantized activation of a net on some images, one byte each (two where a code needs them).

    Attributes:
        codes: by site name, the leading `len(images)` entries of what the quantizer saw at the last look; on the CPU.
    """

    def __init__(self) -> None:
        self.codes: dict[str, Tensor] = {}

    def look(self, net: nn.Module, images: Tensor, precision: AbstractContextManager) -> dict[str, Tensor]:
        """Run the net on the images; what is compiled runs eagerly, since a compiled graph knows no hooks.

        Args:
            net: left as it was.
            images: (B, C, H, W), the same at every look.
            precision: autocast, or nothing.

        Returns:
            By site name, the share of codes that differ from the last look, a scalar each; empty at the first, and behind another number
            of images.
        """
        sites = [s for s in iter_quantizers(net) if not s.is_weight and not s.quantizer.is_float]
        seen: dict[str, Tensor] = {}
        with probing(net, [_remember(site, seen, len(images)) for site in sites]), precision:
            net.forward(images)
        before, self.codes = self.codes, {name: codes.cpu() for name, codes in seen.items()}
        return {name: (codes != before[name]).float().mean() for name, codes in self.codes.items() if _fits(codes, before.get(name))}


def _fits(codes: Tensor, before: Tensor | None) -> bool:
    return before is not None and codes.shape == before.shape


def _remember(site: Site, seen: dict[str, Tensor], rows: int) -> RemovableHandle:
    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[site.name] = site.quantizer.codes(args[0].detach())[:rows].clone()

    return site.quantizer.register_forward_pre_hook(note)


class Oscillation(Callback):
    """Tracks the codes of weights in front of every n-th optimizer step, and of activations on one batch at every validation.

    Logs, by layer and in total: `osc/share` of weights that oscillate, `osc/band` = share near a threshold; in total the mean
    `osc/frequency`, and `osc/flips` so far; by site and as their mean: `osc/act_flipped` = share of activation codes that differ
    from the validation before. The end of the run writes a table.

    Memory: 3 bytes for each tracked weight (`PackedOscillation`, with its error bound), and one for each activation code of the probe.

    Args:
        momentum: weight of one look in the frequency, from 0.0005 to below 1.
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
        check_number("callbacks.oscillation.momentum", momentum, _LOWEST_MOMENTUM, below=1)
        check_number("callbacks.oscillation.threshold", threshold, 0)
        check_boundary("callbacks.oscillation.boundary_range", boundary_range)
        check_int("callbacks.oscillation.every_n_steps", every_n_steps, 1)
        check_int("callbacks.oscillation.max_bits", max_bits, 2)
        check_int("callbacks.oscillation.probe_images", probe_images, 0)
        if dirpath is not None:
            check_text("callbacks.oscillation.dirpath", dirpath)
        self.momentum, self.threshold, self.boundary_range = momentum, threshold, boundary_range
        self.every_n_steps, self.max_bits, self.probe_images, self.dirpath = every_n_steps, max_bits, probe_images, dirpath
        self._sites: list[Site] = []
        self._packed: dict[str, PackedOscillation] = {}
        self._flips: dict[str, Tensor] = {}
        self._activations = ActivationCodes()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights."""
        if stage != "fit":
            return
        self._packed, self._flips, self._activations = {}, {}, ActivationCodes()
        self._sites = [s for s in iter_quantizers(net_of(pl_module)) if s.is_weight and s.quantizer.spec.bits <= self.max_bits]
        if not self._sites:
            raise UsageError(f"callbacks.oscillation.max_bits={self.max_bits}: this net has no quantized weights of so few bits")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Look at the codes of the forward pass that was."""
        if trainer.global_step % self.every_n_steps == 0:
            for site in self._sites:
                self._look(site)
        if logs_now(trainer) and self._packed:
            pl_module.log_dict(self._figures(), on_step=True, on_epoch=False)

    def _look(self, site: Site) -> None:
        codes = site.quantizer.codes(site.latent())
        packed = self._packed.get(site.name)
        state = None
        if packed is not None:
            state = unpack_oscillation(PackedOscillation(*(t.to(codes.device) for t in packed)), self.momentum)
        seen = oscillation_step(state, codes, self.momentum)
        self._packed[site.name] = pack_oscillation(seen, self.momentum)
        before = self._flips.get(site.name)
        flips = seen.flips.sum(dtype=torch.int64)
        self._flips[site.name] = flips if before is None else flips + before.to(flips.device)

    def _in_band(self, site: Site) -> Tensor:
        weight = site.latent().detach()
        grid = site.quantizer.grid(weight)
        return torch.zeros_like(weight, dtype=torch.bool) if grid is None else grid.near_threshold(weight, self.boundary_range)

    def _measure(self, site: Site) -> Tensor:
        """Of one tensor: weights, how many of them oscillate, sum of their frequencies, how many are in the band, flips; (5,) float32."""
        frequency = unpack_oscillation(self._packed[site.name], self.momentum).frequency
        sums = ((frequency > self.threshold).sum(), frequency.sum(), self._in_band(site).sum(), self._flips[site.name])
        return torch.stack([s.float() for s in (torch.full_like(sums[0], frequency.numel()), *sums)])

    @torch.no_grad()
    def measure(self) -> dict[str, Tensor]:
        """By site name, (5,): weights, how many oscillate, sum of frequencies, how many are in the band, flips."""
        return {site.name: self._measure(site) for site in self._looked_at()}

    def _looked_at(self) -> list[Site]:
        """Sites with a state: a run that goes on with a higher `max_bits` has more of them from its next look on."""
        return [site for site in self._sites if site.name in self._packed]

    def _figures(self) -> dict[str, Tensor]:
        measured = self.measure()
        values: dict[str, Tensor] = {}
        for site in self._looked_at():
            n, oscillating, _, near, _ = measured[site.name].unbind()
            values |= {f"osc/share/{site.layer}": oscillating / n, f"osc/band/{site.layer}": near / n}
        n, oscillating, frequency, near, flips = torch.stack(list(measured.values())).sum(0).unbind()
        return {**values, "osc/share": oscillating / n, "osc/frequency": frequency / n, "osc/band": near / n, "osc/flips": flips}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Compare the activation codes of the probe with those of the validation before."""
        outside = trainer.sanity_checking or trainer.state.fn != "fit"
        if outside or batch_idx or dataloader_idx or not self.probe_images:
            return
        images = batch[0][: self.probe_images]
        shares = self._activations.look(net_of(pl_module), images, trainer.precision_plugin.val_step_context())
        if shares:
            values = {f"osc/act_flipped/{name}": share for name, share in shares.items()}
            values["osc/act_flipped"] = torch.stack(list(shares.values())).mean()
            # Each process has a probe of its own; what is told is that of the first. `sync_dist` then does nothing but keep Lightning from
            # advising it, once for every quantizer.
            pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=True, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, say the totals."""
        if not (trainer.is_global_zero and self._packed):
            return
        rows = [_row(site, values) for site, values in zip(self._looked_at(), self.measure().values(), strict=True)]
        total = {"layer": "total", "bits": "", **{k: sum(row[k] for row in rows) for k in ("weights", "oscillating", "in_band", "flips")}}
        total["mean_frequency"] = sum(row["mean_frequency"] * row["weights"] for row in rows) / total["weights"]
        share, near = (100 * total[key] / total["weights"] for key in ("oscillating", "in_band"))
        log.info("oscillation: %.2f %% of %d weights oscillate, %.2f %% are near a threshold", share, total["weights"], near)
        if self.dirpath is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_text(Path(self.dirpath) / FILE, csv_text([*rows, total]))

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        weights = {name: {**packed._asdict(), "flips": self._flips[name]} for name, packed in self._packed.items()}
        return {"weights": weights, "activations": dict(self._activations.codes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        weights = state_dict["weights"]
        self._packed = {name: PackedOscillation(state["codes"], state["memory"]) for name, state in weights.items()}
        self._flips = {name: state["flips"] for name, state in weights.items()}
        self._activations.codes = dict(state_dict["activations"])


def _row(site: Site, values: Tensor) -> dict[str, Any]:
    weights, oscillating, frequency, near, flips = values.tolist()
    return {
        "layer": site.layer,
        "role": site.role,
        "bits": site.quantizer.spec.bits,
        "weights": int(weights),
        "oscillating": int(oscillating),
        "in_band": int(near),
        "flips": int(flips),
        "mean_frequency": frequency / weights,
    }
