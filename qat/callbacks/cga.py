"""Confidence-guided annealing: late in training, train only weights near a decision threshold.

Source: OFQ, arXiv 2302.02210.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from qat.callbacks.freezing import IterativeFreezing
from qat.callbacks.oscillation import log_fraction
from qat.errors import UsageError
from qat.functional.confidence import check_boundary
from qat.model.entry_freezer import EntryFreezer
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import Quantizer, UniformGrid
from qat.utils.validate import check_choice, check_int, check_number

QK_POLICIES = ("reference", "product", "freeze")
# Part of the training that is annealed; OFQ's recipes anneal for 30 of 340 epochs.
_DEFAULT_FRACTION = 0.1


def _near_threshold_mask(quantizer: Quantizer, weight: Tensor, boundary_range: float) -> Tensor:
    grid = cast(UniformGrid, quantizer.grid(weight.detach()))
    return grid.near_threshold(weight, boundary_range)


class BandGate:
    """Passes the gradient of a folded query-key matrix only for entries near a threshold.

    An instance is a pre-forward hook of the matrix's quantizer.

    Args:
        boundary_range: half-width of the band around a threshold, in codes.

    Attributes:
        active: True while annealing; False = all gradients pass.
    """

    def __init__(self, boundary_range: float) -> None:
        self.boundary_range = boundary_range
        self.active = False

    def __call__(self, module: Quantizer, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Return the matrix, with entries outside the band detached; None if inactive."""
        if not self.active:
            return None
        (matrix,) = args
        in_band = _near_threshold_mask(module, matrix, self.boundary_range)
        return (torch.where(in_band, matrix, matrix.detach()),)


class CGA(Callback):
    """During annealing, freezes weights on a half-step grid that are far from a threshold.

    StatsQ, SEQ and DoReFa have such a grid: zero is half-way between two values.

    The frozen entries are chosen again in each step. Frozen entries get no gradient and are
    restored after the step (`EntryFreezer`), so that neither weight decay nor momentum changes
    them; their moments continue to decay. The choice depends only on the weights, so all processes
    agree, nothing is stored, and a resumed run is exact. All other parameters, such as biases,
    norms, scales, stem and heads, continue to train.

    Args:
        boundary_range: half-width of the band around a threshold, in codes, 0 < value < 0.5.
        epochs: number of epochs of annealing; None = until the end of the run, or without
            `start_epoch`, the last tenth of the run.
        start_epoch: first epoch, counted from 0; None = the last `epochs` epochs anneal.
        lr: constant learning rate while annealing, times the `lr_scale` of a group that has one.
        qk: treatment of query and key weights under query-key reparameterization. `reference` =
            they are trained freely, which is the effect of OFQ's code; `product` = the
            gradient of the folded matrix passes only for entries in its band; `freeze` = they are
            frozen.

    Raises:
        UsageError: a setting is invalid. In `setup`: the run ends before `start_epoch` or, without
            `start_epoch`, is shorter than `epochs`; there is nothing to anneal; or
            `IterativeFreezing` is used too.
    """

    # CGA reads and restores single entries of weights between steps.
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
        check_number("callbacks.cga.lr", lr, 0, exclusive_lowest=True)
        check_choice("callbacks.cga.qk", qk, QK_POLICIES)
        if epochs is not None:
            check_int("callbacks.cga.epochs", epochs, 1)
        if start_epoch is not None:
            check_int("callbacks.cga.start_epoch", start_epoch, 0)
        self.boundary_range = boundary_range
        self.epochs = epochs
        self.start_epoch = start_epoch
        self.lr = lr
        self.qk = qk
        self._first_epoch = 0.0
        self._end_epoch = math.inf
        self._sites: list[Site] = []
        self._qk_weights: list[Tensor] = []
        self._gates: list[tuple[Site, BandGate]] = []
        self._freezer = EntryFreezer()
        self._hook_handles: list[torch.utils.hooks.RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Determine the epochs of annealing and the weights to anneal."""
        if stage != "fit":
            return
        self._first_epoch, self._end_epoch = self._annealing_epochs(trainer)
        if any(isinstance(callback, IterativeFreezing) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UsageError(
                "callbacks.cga: callbacks.freeze freezes the same weights; use one of the two"
            )
        all_sites = iter_quantizers(cast(nn.Module, pl_module.net))
        sites = [site for site in all_sites if _is_on_half_steps(site)]
        if not sites:
            raise UsageError(
                "callbacks.cga: this model has no weights on a half-step grid "
                "(statsq, seq, dorefa); use another quant=... or leave cga out"
            )
        self._sites = [site for site in sites if site.role == "weight"]
        self._qk_weights = []
        self._gates = []
        for site in sites:
            if site.role == "qk" and self.qk == "freeze":
                owner: Any = site.owner
                self._qk_weights += [owner.q_weight, owner.k_weight]
            elif site.role == "qk" and self.qk == "product":
                self._gates.append((site, BandGate(self.boundary_range)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook into the optimizer's step, and into the folded matrices if they are gated."""
        self._freezer.attach(trainer.optimizers)
        self._hook_handles = [
            site.quantizer.register_forward_pre_hook(gate) for site, gate in self._gates
        ]

    def check_steps(self, trainer: Trainer, max_steps: int, steps_per_epoch: int) -> None:
        """Check that the run does not end before annealing.

        Args:
            trainer: trainer of the run.
            max_steps: optimizer steps of the whole run; -1 = no limit.
            steps_per_epoch: optimizer steps of an epoch.

        Raises:
            UsageError: annealing would begin after the last step, or `epochs` is too large.
        """
        first_epoch, _ = self._annealing_epochs(trainer)
        first_step = first_epoch * steps_per_epoch
        if max_steps != -1 and max_steps <= first_step:
            raise UsageError(
                f"trainer.max_steps={max_steps}: must be above {first_step:.0f}, the first "
                "step of annealing; or set callbacks.cga.start_epoch"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch the gates and, while annealing, set the learning rate.

        The gates are not switched at the start of an epoch, because a run that is resumed within an
        epoch does not start one.
        """
        for _, gate in self._gates:
            gate.active = self._is_annealing(trainer.current_epoch)
        self._set_learning_rate(trainer, trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """If the next step anneals, set its learning rate, before other callbacks log it.

        After the last batch, the next step belongs to the next epoch.
        """
        self._set_learning_rate(trainer, trainer.current_epoch + int(trainer.is_last_batch))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """While annealing, zero the gradients of frozen entries, and copy the weights.

        Gradients are complete here; Lightning clips them later.
        """
        if not self._is_annealing(trainer.current_epoch):
            return
        trainable_masks = []
        weights_and_masks = []
        for site in self._sites:
            trainable = _near_threshold_mask(site.quantizer, site.latent(), self.boundary_range)
            trainable_masks.append(trainable)
            weights_and_masks.append((site.latent(), ~trainable))
        for weight in self._qk_weights:
            weights_and_masks.append((weight, torch.ones_like(weight, dtype=torch.bool)))
        self._freezer.freeze(weights_and_masks)
        log_fraction(trainer, pl_module, "cga/trainable", trainable_masks)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the hooks, because Lightning does not call `teardown` after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._freezer.detach()
        for handle in self._hook_handles:
            handle.remove()
        self._hook_handles = []

    def _is_annealing(self, epoch: int) -> bool:
        return self._first_epoch <= epoch < self._end_epoch

    def _set_learning_rate(self, trainer: Trainer, epoch: int) -> None:
        if not self._is_annealing(epoch):
            return
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * group.get("lr_scale", 1.0)

    def _annealing_epochs(self, trainer: Trainer) -> tuple[float, float]:
        """First epoch of annealing, and the epoch after the last one; infinity = until the end."""
        num_epochs = trainer.max_epochs or 1  # commands check that `max_epochs` is set
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 0, math.inf
        if self.start_epoch is None:
            num_annealing_epochs = self.epochs or math.ceil(num_epochs * _DEFAULT_FRACTION)
            if num_annealing_epochs > num_epochs:
                raise UsageError(
                    f"callbacks.cga.epochs={num_annealing_epochs}: "
                    f"must be an integer from 1 to trainer.max_epochs={num_epochs}"
                )
            return num_epochs - num_annealing_epochs, math.inf
        if self.start_epoch >= num_epochs:
            raise UsageError(
                f"callbacks.cga.start_epoch={self.start_epoch}: "
                f"must be an integer from 0 to {num_epochs - 1}, "
                f"because trainer.max_epochs={num_epochs}"
            )
        if self.epochs is None:
            return self.start_epoch, math.inf
        return self.start_epoch, self.start_epoch + self.epochs


def _is_on_half_steps(site: Site) -> bool:
    """True for weights on a half-step grid, whose values are symmetric around zero, as in OFQ."""
    if not site.is_weight:
        return False
    grid = site.quantizer.grid(site.latent().detach())
    return isinstance(grid, UniformGrid) and grid.is_half_step
