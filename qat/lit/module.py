"""The LightningModule: a net, a composed loss, a teacher, metrics; one training step for every recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from qat.errors import UsageError
from qat.lit.accuracy import MeanLoss, accuracy_metrics, check_logits, mean_cross_entropy
from qat.lit.strategies import shared_modules, whole
from qat.lit.teacher import Outputs, Teacher
from qat.losses import CompositeLoss, StepContext
from qat.model.checkpoint import Checkpoint
from qat.model.metadata import META_KEY
from qat.model.sites import iter_quantizers
from qat.model.storage import build_from
from qat.nn.quant_module import keep_weights
from qat.quantizers import LSQ
from qat.utils.validate import check_choice

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
MEANS_KEY = "epoch_means"
MOST_CONFUSED = 2000  # classes; the matrix of more would be larger than a net
SchedulerFactory = Callable[[torch.optim.Optimizer, int, int], tuple[Scheduler, str]]


class QATModule(LightningModule):
    """Trains and evaluates one net.

    Args:
        net: float or converted and initialised; its state dict is the checkpoint's, under `net.`.
        loss: what to minimise.
        num_classes: number of classes.
        optimizer: makes the optimizer from the net.
        scheduler: makes the schedule and its interval from the optimizer, the number of epochs and the steps per epoch.
        teacher: its logits reach the loss; not part of checkpoints.
        describe: what checkpoints say beside the weights (`qat.model.metadata.describe`).
        lsq_grad_batch: `global` = LSQ's gradient scale counts the global batch, so that one process and several agree; `process` = the
            batch of one process, as in the paper's code.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: CompositeLoss,
        *,
        num_classes: int,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        teacher: Teacher | None = None,
        describe: dict[str, Any] | None = None,
        lsq_grad_batch: str = "global",
    ) -> None:
        super().__init__()
        check_choice("lsq_grad_batch", lsq_grad_batch, ("global", "process"))
        if loss.needs_teacher and hasattr(net, "set_distilled_training"):
            net.set_distilled_training(enable=True)  # type: ignore[operator]  # a distilled timm net then gives both heads' logits in training
        loss.prepare(net)
        self.lsq_grad_batch = lsq_grad_batch
        self.net = net
        self.loss = loss
        self.teacher = teacher
        self._optimizer, self._scheduler, self._describe = optimizer, scheduler, describe
        self._outputs = Outputs.of_blocks(net, loss.blocks)
        self._accumulated = 1  # batches of the step under way
        self._groups = 0  # of the optimizer when training starts
        self._frozen: list[nn.Parameter] = []  # when training starts
        self._steps = math.inf  # of the whole run, known once the loader is set up
        self.val_metrics = accuracy_metrics(num_classes, "val/")
        self.test_metrics = accuracy_metrics(num_classes, "test/")
        self.val_loss, self.test_loss = MeanLoss(), MeanLoss()
        self.test_confusion = (
            MulticlassConfusionMatrix(num_classes) if num_classes <= MOST_CONFUSED else None
        )
        self.confusion: Tensor | None = (
            None  # (K, K) on the CPU once a test has ended: images by true and by predicted class
        )
        names = ("loss", *(f"loss_{name}" for name in loss.terms))
        self.train_means: Any = nn.ModuleDict({name: MeanLoss() for name in names})

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.net(images)

    def setup(self, stage: str) -> None:
        """Count the global batch in LSQ's gradient scale."""
        if stage == "fit":
            self._accumulate(self.trainer.accumulate_grad_batches)

    def _accumulate(self, batches: int) -> None:
        """Have the next step accumulate so many batches."""
        self._accumulated = batches
        if self.lsq_grad_batch == "global":
            for site in iter_quantizers(self.net):
                for step in (
                    ()
                    if site.is_weight
                    else (m for m in site.quantizer.modules() if isinstance(m, LSQ))
                ):
                    step.grad_factor = (self.trainer.world_size * batches) ** -0.5

    def on_fit_start(self) -> None:
        """Bring the teacher to where the net is now, and to its dtype: Lightning does not know of it."""
        if self.teacher is not None:
            self.teacher.to(self.device, next(self.net.parameters()).dtype)

    def on_train_start(self) -> None:
        """Put the learning rate where the schedule has it now: a resumed run begins in the middle of it."""
        self._steps = max(float(self.trainer.estimated_stepping_batches), 1.0)
        self._groups = sum(len(optimizer.param_groups) for optimizer in self.trainer.optimizers)
        self._frozen = [
            parameter for parameter in self.net.parameters() if not parameter.requires_grad
        ]
        for config in self.trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            schedule.step(self.current_epoch)
            schedule.step_update(self.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch (images, targets)."""
        images, _ = batch
        full = self.trainer.accumulate_grad_batches
        batches_left = self.trainer.num_training_batches - batch_idx // full * full
        # Less than `full` where the batches of an epoch do not fill its last step.
        accumulated = int(min(full, batches_left))
        if accumulated != self._accumulated:
            self._accumulate(accumulated)
        total, parts = self.loss(self.context(batch, self.global_step / self._steps))
        self.log(
            "train/loss_step",
            total.detach(),
            on_step=True,
            on_epoch=False,
            prog_bar=True,
            batch_size=len(images),
        )
        self.log_dict(
            {f"train/{name}": value for name, value in self.loss.watched().items()},
            on_step=True,
            on_epoch=False,
        )
        for name, value in {
            "loss": total.detach(),
            **{f"loss_{k}": v for k, v in parts.items()},
        }.items():
            mean = self.train_means[name]
            mean.update(value, weight=len(images))
            self.log(f"train/{name}", mean, on_step=False, on_epoch=True, batch_size=len(images))
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; Lightning has divided the loss by the batches of a full step, where the mean of this step's counts."""
        super().backward(
            loss * (self.trainer.accumulate_grad_batches / self._accumulated), *args, **kwargs
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse weights that a callback unfreezes during the run: the schedule and weight decay know only those of its start.

        Raises:
            UsageError: parameters that were frozen train now, or the optimizer has got another group.
        """
        groups = sum(len(one.param_groups) for one in self.trainer.optimizers)
        if groups != self._groups or any(parameter.requires_grad for parameter in self._frozen):
            raise UsageError(
                "callbacks: weights were unfrozen during the run, where neither schedule nor weight decay apply to them; "
                "must be frozen to the end, and trained in a second run with ckpt=FILE"
            )

    def context(self, batch: tuple[Tensor, Tensor], progress: float = 0.0) -> StepContext:
        """Run teacher and net on a batch (images, targets), for the loss to compare."""
        images, target = batch
        teacher_logits, followed = (
            self.teacher.with_features(images, self.loss.blocks) if self.teacher else (None, [])
        )
        with self._outputs.of_pass() as features:
            logits = self.net(images)
        return StepContext(logits, target, teacher_logits, self.net, progress, features, followed)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate validation metrics."""
        self._evaluate(batch, self.val_metrics, self.val_loss)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate test metrics."""
        logits = self._evaluate(batch, self.test_metrics, self.test_loss)
        if self.test_confusion is not None:
            self.test_confusion.update(logits, batch[1])

    def on_test_epoch_end(self) -> None:
        """Gather the confusion matrix of all processes while they are connected.

        Raises:
            UsageError: a logit was not finite.
        """
        check_logits(float(self.test_loss.compute()), "evaluation")
        if self.test_confusion is not None:
            self.confusion = self.test_confusion.compute().cpu()
            self.test_confusion.reset()

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, mean_loss: MeanLoss
    ) -> Tensor:
        images, target = batch
        logits = self.net(images).float()
        metrics.update(logits, target)
        mean_loss.update(mean_cross_entropy(logits, target), weight=len(images))
        self.log_dict(metrics, batch_size=len(images))
        self.log(f"{metrics.prefix}loss", mean_loss, batch_size=len(images))
        return logits

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule if there is one."""
        if self._optimizer is None:
            raise RuntimeError(
                "QATModule was built without an optimizer: it can evaluate, not train"
            )
        optimizer = self._optimizer(self.net)
        if self._scheduler is None:
            return optimizer
        epochs = self.trainer.max_epochs or 1
        if epochs < 0:
            raise UsageError(
                "trainer.max_epochs=-1: must be at least 1: schedules are laid out for epochs"
            )
        schedule, interval = self._scheduler(optimizer, epochs, steps_per_epoch(self.trainer))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Move a schedule of timm's on: they are functions of the epoch or step that comes next."""
        if scheduler.t_in_epochs:
            scheduler.step(self.current_epoch + 1)
        else:
            scheduler.step_update(self.global_step)

    def make_whole(self) -> None:
        """Put a whole net in the place of one whose weights the processes share, once it is trained; all of them have to call it."""
        if shared_modules(self.net):
            state = {name: whole(value).cpu() for name, value in self.net.state_dict().items()}
            self.net = build_from(Checkpoint(Path("last.ckpt"), state, self._describe))

    def on_validation_epoch_start(self) -> None:
        """Validate one net, not one a process; an average of weights is in its place by now."""
        self._average_batch_norms()

    def on_validation_start(self) -> None:
        """Validate or test a net whose weights do not change meanwhile."""
        # Weights that processes share are gathered anew for every use, which torch does not count as a change.
        keep_weights(self.net, keep=not shared_modules(self.net))

    def on_validation_end(self) -> None:
        """Other weights may come back now: those in training, if an average was validated."""
        keep_weights(self.net, keep=False)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def _average_batch_norms(self) -> None:
        """Give batch norms the mean of the processes' running statistics, in place."""
        # In the validation of a fit `trainer.training` is false.
        if self.trainer.world_size > 1 and self.trainer.state.fn == TrainerFn.FITTING:
            distribute_bn(self.net, self.trainer.world_size, reduce=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what is needed to rebuild the net from the file alone, and the means of an epoch that is under way."""
        self._average_batch_norms()  # the weights in the file are these tensors
        if self._describe is not None:
            checkpoint[META_KEY] = self._describe
        if not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            checkpoint[MEANS_KEY] = {  # sums, each of all processes: (processes,)
                name: {
                    key: cast(Tensor, self.all_gather(value)).reshape(-1)
                    for key, value in mean.metric_state.items()
                }
                for name, mean in self.train_means.items()
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the means of the epoch that was under way; those of other terms, or under other processes, begin anew.

        Raises:
            UsageError: the run averaged its weights, and no callback would go on with that.
        """
        averages = any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if "averaging_state" in checkpoint and not averages:
            raise UsageError(
                "resume: the run averages its weights; resume with callbacks=[default,ema], or start from the average with ckpt=PATH"
            )
        sums_of = checkpoint.get(MEANS_KEY, {})
        for name in self.train_means.keys() & sums_of.keys():
            for key, sums in (
                sums_of[name].items()
                if len(sums_of[name]["weight"]) == self.trainer.world_size
                else ()
            ):
                setattr(self.train_means[name], key, sums[self.global_rank].to(self.device))


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer steps of one epoch, at least 1.

    Not from `trainer.estimated_stepping_batches`: asked before a checkpoint is restored, that makes Lightning set up the train loader
    for good, and the loader of a resumed run would never learn where its epoch was left.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    if datamodule is None:
        return max(int(trainer.estimated_stepping_batches) // max(trainer.max_epochs or 1, 1), 1)
    batches, limit = len(datamodule.train_dataloader()), trainer.limit_train_batches
    batches = (
        min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    )  # a count, or a share
    every = trainer.val_check_interval
    if isinstance(every, int) and every > batches and trainer.check_val_every_n_epoch:
        raise UsageError(
            f"trainer.val_check_interval={every}: must be at most the {batches} batches of an epoch; "
            "more with trainer.check_val_every_n_epoch=null"
        )
    return max(math.ceil(batches / trainer.accumulate_grad_batches), 1)
