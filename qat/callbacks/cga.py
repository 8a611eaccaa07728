"""Confidence-guided annealing: late in training only weights near a decision threshold move. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.callbacks.oscillation import IterativeFreezing, log_share
from qat.errors import UsageError
from qat.functional.confidence import check_boundary
from qat.model.entry_freezer import EntryFreezer
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import Quantizer, UniformGrid
from qat.utils.validate import check_choice, check_int, check_number

QK_POLICIES = ("reference", "product", "freeze")
# 30 of 340 epochs in the paper's recipes.
_DEFAULT_SHARE = 0.1


def _near(quantizer: Quantizer, weight: Tensor, boundary_range: float) -> Tensor:
    return cast(UniformGrid, quantizer.grid(weight.detach())).near_threshold(weight, boundary_range)


class BandGate:
    """Lets the gradient of a folded query-key matrix pass only where the matrix is near a threshold; a hook on its quantizer.

    Args:
        boundary_range: half-width of the band, in codes.

    Attributes:
        active: off until annealing begins.
    """

    def __init__(self, boundary_range: float) -> None:
        self.boundary_range, self.active = boundary_range, False

    def __call__(self, module: Quantizer, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """The matrix, detached outside the band."""
        if not self.active:
            return None
        (matrix,) = args
        return (torch.where(_near(module, matrix, self.boundary_range), matrix, matrix.detach()),)


class CGA(Callback):
    """In the epochs of annealing, freezes every weight on half steps (StatsQ, SEQ) that is not near a threshold, anew in each step.

    Frozen entries get no gradient and are written back after the step (`EntryFreezer`), so neither weight decay nor momentum moves them;
    the moments go on decaying. Which entries these are is a function of the weights alone: all processes agree, nothing is
    stored, a resumed run goes on exactly. Biases, norms, tokens, scales, offsets, stem and heads train as before.

    Args:
        boundary_range: half-width of the band around a threshold, in codes, 0 < value < 0.5.
        epochs: how many epochs; None = up to the end of the run or, without `start_epoch`, its last tenth.
        start_epoch: first epoch, counted from 0; None = such that the last `epochs` epochs anneal.
        lr: constant learning rate while annealing; the schedule does not change it.
        qk: what query and key weights do under query-key reparameterization. `reference` = they train freely, which is what the
            paper's code does in effect; `product` = the gradient of the folded matrix is gated by that matrix's own band;
            `freeze` = they are frozen.

    Raises:
        UsageError: a setting cannot work. In `setup`: the epochs do not fit the run, or there is nothing to anneal.
    """

    # It reads and holds weights between steps, entry by entry.
    needs_whole_weights = True

    def __init__(
        self,
        boundary_range: float = 0.005,
        epochs: int | None = None,
        start_epoch: int | None = None,
        lr: float = 1e-5,
        qk: str = "reference",
    ) -> None:
        check_boundary("callbacks.cga.boundary_range", boundary_range)
        check_number("callbacks.cga.lr", lr, 0, above=True)
        check_choice("callbacks.cga.qk", qk, QK_POLICIES)
        if epochs is not None:
            check_int("callbacks.cga.epochs", epochs, 1)
        if start_epoch is not None:
            check_int("callbacks.cga.start_epoch", start_epoch, 0)
        self.boundary_range, self.epochs, self.start_epoch, self.lr, self.qk = (
            boundary_range,
            epochs,
            start_epoch,
            lr,
            qk,
        )
        self._first, self._stop = 0.0, math.inf
        self._sites: list[Site] = []
        self._factors: list[Any] = []
        self._products: list[tuple[Site, BandGate]] = []
        self._freezer = EntryFreezer()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the epochs and the weights."""
        if stage != "fit":
            return
        self._first, self._stop = self._span(trainer)
        if any(isinstance(callback, IterativeFreezing) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UsageError(
                "callbacks.cga: callbacks.freeze freezes the same weights; use one of the two"
            )
        sites = [site for site in iter_quantizers(cast(nn.Module, pl_module.net)) if site.is_weight]
        # The paper's thresholds lie between two values of one magnitude.
        found = [
            s
            for s in sites
            if isinstance(grid := s.quantizer.grid(s.latent().detach()), UniformGrid)
            and grid.is_half_step
        ]
        self._sites = [site for site in found if site.role == "weight"]
        self._factors = [
            f
            for s in found
            if s.role == "qk" and self.qk == "freeze"
            for f in (s.owner.q_weight, s.owner.k_weight)
        ]
        self._products = [
            (s, BandGate(self.boundary_range))
            for s in found
            if s.role == "qk" and self.qk == "product"
        ]
        if not found:
            raise UsageError(
                "callbacks.cga: this model has no weights on a half-step grid (statsq, seq); use another quant=... or leave cga out"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook into the optimizer's step, and into the folded matrices if they are gated."""
        self._freezer.attach(trainer.optimizers)
        self._handles = [
            site.quantizer.register_forward_pre_hook(gate) for site, gate in self._products
        ]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open or close the gates, keep the rate. Not by the epoch alone: a run resumed in the middle of one starts no epoch."""
        for _, gate in self._products:
            gate.active = self._anneals(trainer.current_epoch)
        self._pin_rate(trainer, trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the learning rate of the next step, so that what logs it has the one in force."""
        self._pin_rate(trainer, trainer.current_epoch + int(trainer.is_last_batch))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Zero the gradients of frozen entries and remember their values; gradients are complete here, and clipped afterwards."""
        if not self._anneals(trainer.current_epoch):
            return
        near = [_near(site.quantizer, site.latent(), self.boundary_range) for site in self._sites]
        frozen = [(site.latent(), ~mask) for site, mask in zip(self._sites, near, strict=True)]
        self._freezer.freeze([
            *frozen,
            *((factor, torch.ones_like(factor, dtype=torch.bool)) for factor in self._factors),
        ])
        log_share(trainer, pl_module, "cga/trainable", near)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._freezer.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _anneals(self, epoch: int) -> bool:
        return self._first <= epoch < self._stop

    def _pin_rate(self, trainer: Trainer, epoch: int) -> None:
        if self._anneals(epoch):
            for group in (g for optimizer in trainer.optimizers for g in optimizer.param_groups):
                group["lr"] = self.lr * group.get("lr_scale", 1.0)

    def _span(self, trainer: Trainer) -> tuple[float, float]:
        """First epoch, and the one after the last; that is infinity where annealing lasts to the end."""
        total = trainer.max_epochs or 1  # which the tasks demand
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 0, math.inf
        if self.start_epoch is None:
            length = self.epochs or math.ceil(total * _DEFAULT_SHARE)
            if length > total:
                raise UsageError(
                    f"callbacks.cga.epochs={length}: must be an integer from 1 to trainer.max_epochs={total}"
                )
            return total - length, math.inf
        if self.start_epoch >= total:
            raise UsageError(
                f"callbacks.cga.start_epoch={self.start_epoch}: must be from 0 to below trainer.max_epochs={total}"
            )
        return self.start_epoch, math.inf if self.epochs is None else self.start_epoch + self.epochs
