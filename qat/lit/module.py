"""The LightningModule: net, loss, teacher and metrics, with one training step for all recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from timm.utils import distribute_bn
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from qat.data import ImageData
from qat.errors import UsageError
from qat.lit.accuracy import MeanLoss, accuracy_metrics, check_logits, mean_cross_entropy
from qat.lit.optim import SchedulerFactory, build_optimizer, scheduler_factory
from qat.lit.strategies import gather_tensor, sharded_modules
from qat.lit.teacher import OutputRecorder, Teacher
from qat.losses import CompositeLoss, CrossEntropy, Distillation, LossTerm, StepContext
from qat.model.checkpoint import Checkpoint
from qat.model.metadata import META_KEY, describe
from qat.model.sites import iter_quantizers
from qat.model.storage import build_from
from qat.nn.quant_module import keep_weights
from qat.quantizers import LSQ
from qat.utils.validate import check_choice

MEANS_KEY = "epoch_means"
# Maximum number of classes for which a confusion matrix is kept; at this number, it takes 32 MB.
MAX_CONFUSION_CLASSES = 2000
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


class QATModule(LightningModule):
    """Trains and evaluates one net.

    Args:
        net: a float net, or a converted net with scales; checkpoints store its state dict under
            `net.`.
        loss: the loss to minimize.
        num_classes: number of classes.
        optimizer: builds the optimizer from the net; None = the module only evaluates.
        scheduler: builds the schedule and its interval from the optimizer, the number of epochs and
            the steps per epoch; None = a constant learning rate.
        teacher: the teacher, whose outputs are passed to the loss; None = the loss needs none.
            Checkpoints do not contain the teacher.
        describe: metadata of checkpoints (`qat.model.metadata.describe`).
        lsq_grad_batch: `global` = LSQ's gradient scale is computed for the global batch, so that
            results do not depend on the number of processes; `process` = for the batch of one
            process, as in OFQ's code.
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
            # With this setting, a distilled timm net returns the logits of both heads in training.
            net.set_distilled_training(enable=True)  # type: ignore[operator]
        loss.prepare(net)
        self.lsq_grad_batch = lsq_grad_batch
        self.net = net
        self.loss = loss
        self.teacher = teacher
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._metadata = describe
        self._output_recorder = OutputRecorder.for_blocks(net, loss.blocks)
        self._num_accumulated = 1  # number of batches in the current step
        self._num_groups = 0  # parameter groups of all optimizers when training starts
        self._initially_frozen: list[nn.Parameter] = []  # frozen parameters when training starts
        self._num_steps = math.inf  # steps of the whole run; known once the loader is set up
        self.val_metrics = accuracy_metrics(num_classes, "val/")
        self.test_metrics = accuracy_metrics(num_classes, "test/")
        self.val_loss = MeanLoss()
        self.test_loss = MeanLoss()
        self.test_confusion: MulticlassConfusionMatrix | None = None
        if num_classes <= MAX_CONFUSION_CLASSES:
            self.test_confusion = MulticlassConfusionMatrix(num_classes)
        # After a test with `test_confusion`: (K, K) on the CPU, images by true and predicted class.
        self.confusion: Tensor | None = None
        # After a test in one process: (N,) on the CPU, True for each image that is classified
        # correctly. Not set with several processes, which would have to restore the order.
        self.correct: Tensor | None = None
        self._correct_batches: list[Tensor] = []
        names = ["loss"] + [f"loss_{term}" for term in loss.terms]
        self.train_means: Any = nn.ModuleDict({name: MeanLoss() for name in names})

    @classmethod
    def for_data(
        cls,
        net: nn.Module,
        data: ImageData,
        *,
        teacher: nn.Module | None = None,
        loss: Mapping[str, LossTerm] | None = None,
        warmup_epochs: float = 0.0,
        **optimizer: Any,
    ) -> QATModule:
        """Build a module that trains a net on a dataset, by default as `train.py` does.

        The learning rate follows a cosine. Checkpoints describe the net and the dataset, so that
        `qat.load` and all commands read them.

        Args:
            net: a float net, or a converted net with scales.
            data: the dataset.
            teacher: a net that this net learns from; it is frozen.
            loss: terms by name; None = cross-entropy, with a teacher also distillation.
            warmup_epochs: number of first epochs, in which the learning rate rises.
            optimizer: arguments of `build_optimizer`; by default AdamW, with lr 1e-3 and weight
                decay 0.05.

        Raises:
            UsageError: the numbers of classes of net and data differ, a term lacks its teacher, or
                the net does not record how timm built it.
        """
        num_classes = data.settings.num_classes
        model_classes = getattr(net, "num_classes", num_classes)
        if model_classes != num_classes:
            raise UsageError(
                f"data.num_classes={num_classes}: must be {model_classes}, the classes of the model"
            )
        if loss is None:
            loss = {"ce": CrossEntropy()} if teacher is None else {"kd": Distillation()}
        terms = CompositeLoss(loss)
        if terms.needs_teacher and teacher is None:
            raise UsageError("teacher=None: must be a model, because a loss term needs a teacher")
        settings = {"lr": 1e-3, "weight_decay": 0.05, **optimizer}
        return cls(
            net,
            terms,
            num_classes=num_classes,
            optimizer=partial(build_optimizer, **settings),
            scheduler=scheduler_factory(
                warmup_epochs=warmup_epochs, min_lr=min(1e-5, settings["lr"])
            ),
            teacher=None if teacher is None else Teacher(teacher),
            describe=describe(net, data=data.config(), classes=data.named_classes()),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W), or a pair in distilled training (timm)."""
        return self.net(images)

    def setup(self, stage: str) -> None:
        """Fit activations' LSQ gradient scale to the global batch if `lsq_grad_batch=global`."""
        if stage == "fit":
            self._set_accumulation(self.trainer.accumulate_grad_batches)

    def _set_accumulation(self, batches: int) -> None:
        """Set the number of batches that the next step accumulates, and LSQ's gradient scale."""
        self._num_accumulated = batches
        factor = 1.0
        if self.lsq_grad_batch == "global":
            factor = (self.trainer.world_size * batches) ** -0.5
        for site in iter_quantizers(self.net):
            if site.is_weight:
                continue
            for quantizer in site.quantizer.modules():
                if isinstance(quantizer, LSQ):
                    quantizer.grad_factor = factor

    def on_fit_start(self) -> None:
        """Move the teacher, which Lightning does not know, to the device and dtype of the net."""
        if self.teacher is not None:
            self.teacher.to(self.device, next(self.net.parameters()).dtype)

    def on_train_start(self) -> None:
        """Record the initial state, and apply the schedule, if any, at this step."""
        self._num_steps = max(float(self.trainer.estimated_stepping_batches), 1.0)
        self._num_groups = _count_groups(self.trainer)
        self._initially_frozen = [p for p in self.net.parameters() if not p.requires_grad]
        for config in self.trainer.lr_scheduler_configs:
            schedule: Any = config.scheduler
            schedule.step(self.current_epoch)
            schedule.step_update(self.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch (images, targets)."""
        images, _ = batch
        batches_per_step = self.trainer.accumulate_grad_batches
        first_batch_of_step = batch_idx // batches_per_step * batches_per_step
        # The last step of an epoch may have fewer batches.
        num_accumulated = int(
            min(batches_per_step, self.trainer.num_training_batches - first_batch_of_step)
        )
        if num_accumulated != self._num_accumulated:
            self._set_accumulation(num_accumulated)
        loss, terms = self.loss(self.context(batch, self.global_step / self._num_steps))
        self.log(
            "train/loss_step",
            loss.detach(),
            on_step=True,
            on_epoch=False,
            prog_bar=True,
            batch_size=len(images),
        )
        logged_values = {
            f"train/{name}": value for name, value in self.loss.logged_values().items()
        }
        self.log_dict(logged_values, on_step=True, on_epoch=False)
        losses = {"loss": loss.detach()}
        losses |= {f"loss_{term}": value for term, value in terms.items()}
        for name, value in losses.items():
            mean = self.train_means[name]
            mean.update(value, weight=len(images))
            self.log(f"train/{name}", mean, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of the mean over the batches of this step.

        Lightning has already divided the loss by the number of batches of a full step.
        """
        correction = self.trainer.accumulate_grad_batches / self._num_accumulated
        super().backward(loss * correction, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse weights that a callback unfreezes during the run.

        The schedule and weight decay apply only to weights that are trained from the start.

        Raises:
            UsageError: a parameter that was frozen now requires gradients, or there is a new
                parameter group.
        """
        is_unfrozen = any(parameter.requires_grad for parameter in self._initially_frozen)
        if is_unfrozen or _count_groups(self.trainer) != self._num_groups:
            raise UsageError(
                "callbacks: weights were unfrozen during the run, "
                "but the schedule and weight decay do not apply to them; "
                "they must stay frozen to the end, and be trained in a second run with ckpt=FILE"
            )

    def context(self, batch: tuple[Tensor, Tensor], progress: float = 0.0) -> StepContext:
        """Run the net and any teacher on a batch (images, targets), and collect inputs of the loss.

        `progress` is the completed fraction of the run, 0 to 1.
        """
        images, target = batch
        teacher_logits: Tensor | None = None
        teacher_features: list[Tensor] = []
        if self.teacher is not None:
            teacher_logits, teacher_features = self.teacher.with_features(images, self.loss.blocks)
        with self._output_recorder.record_pass() as features:
            logits = self.net(images)
        return StepContext(
            logits, target, teacher_logits, self.net, progress, features, teacher_features
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate validation metrics."""
        self._evaluate(batch, self.val_metrics, self.val_loss)

    def on_test_epoch_start(self) -> None:
        """Forget the predictions of earlier tests, which may have failed."""
        self._correct_batches.clear()
        if self.test_confusion is not None:
            self.test_confusion.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accumulate test metrics."""
        logits = self._evaluate(batch, self.test_metrics, self.test_loss)
        self._correct_batches.append(logits.argmax(1) == batch[1])
        if self.test_confusion is not None:
            self.test_confusion.update(logits, batch[1])

    def on_test_epoch_end(self) -> None:
        """Set `correct` in a run of one process, and `confusion` unless there are too many classes.

        Raises:
            UsageError: a logit is not finite.
        """
        check_logits(float(self.test_loss.compute()), "evaluation")
        if self.trainer.world_size == 1:
            self.correct = torch.cat(self._correct_batches).cpu()
        if self.test_confusion is not None:
            self.confusion = self.test_confusion.compute().cpu()

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, mean_loss: MeanLoss
    ) -> Tensor:
        """Add a batch to metrics and loss, and return its logits (B, K)."""
        images, target = batch
        logits = self.net(images).float()
        metrics.update(logits, target)
        mean_loss.update(mean_cross_entropy(logits, target), weight=len(images))
        self.log_dict(metrics, batch_size=len(images))
        self.log(f"{metrics.prefix}loss", mean_loss, batch_size=len(images))
        return logits

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and any schedule.

        Raises:
            RuntimeError: there is no optimizer.
            UsageError: a setting is refused.
        """
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
                "trainer.max_epochs=-1: must be at least 1, as schedules need a number of epochs"
            )
        schedule, interval = self._scheduler(optimizer, epochs, steps_per_epoch(self.trainer))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Update timm's schedule, which expects the number of the next epoch or step."""
        if scheduler.t_in_epochs:
            scheduler.step(self.current_epoch + 1)
        else:
            scheduler.step_update(self.global_step)

    def unshard_net(self) -> None:
        """After training, rebuild a sharded net as an unsharded net in every process."""
        if sharded_modules(self.net):
            state = {
                name: gather_tensor(value).cpu() for name, value in self.net.state_dict().items()
            }
            self.net = build_from(Checkpoint(Path("last.ckpt"), state, self._metadata))

    def on_validation_epoch_start(self) -> None:
        """Average batch norms, so that all processes validate the same net.

        Averaged weights (`WeightAveraging`) are already in place.
        """
        self._average_batch_norms()

    def on_validation_start(self) -> None:
        """Quantize weights only once, because they do not change during a validation or test."""
        # Except for sharded weights: torch does not count their gathering as a change, so quantized
        # weights could be outdated.
        keep_weights(self.net, keep=not sharded_modules(self.net))

    def on_validation_end(self) -> None:
        """Discard the quantized weights, because the net's weights will change."""
        keep_weights(self.net, keep=False)

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def _average_batch_norms(self) -> None:
        """In a fit, average the statistics of batch norms over the processes, in place."""
        # `trainer.training` cannot be used: it is false in the validation of a fit.
        if self.trainer.world_size > 1 and self.trainer.state.fn == TrainerFn.FITTING:
            distribute_bn(self.net, self.trainer.world_size, reduce=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata to rebuild the net, and the mean losses of an unfinished epoch."""
        # Average before saving: the checkpoint refers to the tensors that are averaged in place.
        self._average_batch_norms()
        if self._metadata is not None:
            checkpoint[META_KEY] = self._metadata
        if not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            checkpoint[MEANS_KEY] = {
                name: self._gather_sums(mean) for name, mean in self.train_means.items()
            }

    def _gather_sums(self, mean: MeanLoss) -> dict[str, Tensor]:
        """The sums of a mean metric in all processes, (processes,)."""
        sums = {}
        for key, value in mean.metric_state.items():
            sums[key] = cast(Tensor, self.all_gather(value)).reshape(-1)
        return sums

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the mean losses of an unfinished epoch.

        New terms start from zero, and so do all terms if the number of processes has changed.

        Raises:
            UsageError: a resumed run averaged its weights, but no callback continues the average.
        """
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        has_averaging = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        is_resumed = self.trainer.state.fn == TrainerFn.FITTING
        if is_resumed and "averaging_state" in checkpoint and not has_averaging:
            raise UsageError(
                "resume: the run averages its weights; resume with callbacks=[default,ema], "
                "or start from the average with ckpt=PATH"
            )
        sums_by_name = checkpoint.get(MEANS_KEY, {})
        for name in self.train_means.keys() & sums_by_name.keys():
            if len(sums_by_name[name]["weight"]) != self.trainer.world_size:
                continue
            for key, sums in sums_by_name[name].items():
                setattr(self.train_means[name], key, sums[self.global_rank].to(self.device))


def _count_groups(trainer: Trainer) -> int:
    """Number of parameter groups of all optimizers."""
    return sum(len(optimizer.param_groups) for optimizer in trainer.optimizers)


def steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer steps of one epoch, at least 1.

    With a datamodule, `trainer.estimated_stepping_batches` cannot be used. If it is read before a
    checkpoint is restored, Lightning sets up the train loader once and for all, and the loader of a
    resumed run would not learn at which batch to continue.

    Raises:
        UsageError: `trainer.val_check_interval` must fit into an epoch and does not, or the train
            loader has no length.
    """
    no_length = (
        "the train loader has no length; give it __len__, or set limit_train_batches of the "
        "Trainer to a number of batches"
    )
    datamodule: Any = getattr(trainer, "datamodule", None)
    if datamodule is None:
        if trainer.estimated_stepping_batches < 0:
            raise UsageError(no_length)
        batches = trainer.num_training_batches
        if math.isfinite(batches):
            return max(math.ceil(batches / trainer.accumulate_grad_batches), 1)
        return max(int(trainer.estimated_stepping_batches) // max(trainer.max_epochs or 1, 1), 1)
    limit = trainer.limit_train_batches
    loader = datamodule.train_dataloader()
    try:
        batches = len(loader)
    except (TypeError, NotImplementedError) as error:
        if not isinstance(limit, int):
            raise UsageError(no_length) from error
        batches = limit
    # The limit is a number or a fraction of batches.
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > batches and trainer.check_val_every_n_epoch:
        raise UsageError(
            f"trainer.val_check_interval={interval}: "
            f"must be at most the {batches} batches of an epoch; "
            "for a longer interval, set trainer.check_val_every_n_epoch=null"
        )
    return max(math.ceil(batches / trainer.accumulate_grad_batches), 1)
