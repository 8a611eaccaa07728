"""Optimizer groups and learning-rate schedules, from timm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.models import group_parameters
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from qat.errors import UsageError
from qat.model.sites import find_blocks, no_weight_decay, quantizer_parameters
from qat.nn import hf_models
from qat.utils.validate import check_choice, check_int, check_number, unknown_message

SchedulerFactory = Callable[[torch.optim.Optimizer, int, int], tuple[Scheduler, str]]
GROUPS = ("decay", "no_decay", "scales")
# timm's names of the optimizers that are fused by default.
_FUSED = {"adam", "adamw"}


def parameter_groups(
    net: nn.Module,
    *,
    weight_decay: float,
    scale_lr_factor: float = 1.0,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters of a net in three groups, or with `layer_decay` in three for each layer.

    The groups are weights, with weight decay; biases, norms, tokens and offsets, without weight
    decay; and scales, without weight decay and with a separate learning rate.

    Args:
        net: the net to train.
        weight_decay: weight decay of weights.
        scale_lr_factor: learning rate of the scales relative to the other parameters.
        layer_decay: factor on the learning rate from one layer to the previous layer (1 for the
            head); None = all layers have the same learning rate.

    Returns:
        Non-empty groups for an optimizer; timm's schedulers multiply the learning rate of a group
        by its `lr_scale`.

    Raises:
        UsageError: `layer_decay` is not in (0, 1], or the layers of the net cannot be numbered.
    """
    layer_numbers = {} if layer_decay is None else _layer_numbers(net, layer_decay)
    last_layer = max(layer_numbers.values(), default=0)
    scales, _ = quantizer_parameters(net)
    without_decay = no_weight_decay(net)
    groups: dict[tuple[str, int], list[nn.Parameter]] = {}
    for layer in range(last_layer + 1):
        for kind in GROUPS:
            groups[kind, layer] = []
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "decay"
        if parameter in scales:
            kind = "scales"
        elif name in without_decay:
            kind = "no_decay"
        groups[kind, layer_numbers.get(name, last_layer)].append(parameter)

    group_settings = []
    for (kind, layer), parameters in groups.items():
        if not parameters:
            continue
        kind_scale = scale_lr_factor if kind == "scales" else 1.0
        layer_scale = (layer_decay or 1.0) ** (last_layer - layer)
        group_settings.append({
            "params": parameters,
            "weight_decay": weight_decay if kind == "decay" else 0.0,
            "lr_scale": kind_scale * layer_scale,
            "name": kind if layer_decay is None else f"layer{layer}_{kind}",
        })
    return group_settings


def _layer_numbers(net: nn.Module, layer_decay: float) -> dict[str, int]:
    """Layer number of each parameter, by name, as in timm: 0 = embedding, highest = head."""
    check_number("optimizer.layer_decay", layer_decay, 0, exclusive_lowest=True, highest=1)
    models = hf_models(net)
    blocks = find_blocks(net) if models else {}
    if blocks:
        return _layers_of_transformers(net, list(blocks))
    if not hasattr(net, "group_matcher"):
        name = type(models[0] if models else net).__name__
        raise UsageError(
            f"optimizer.layer_decay={layer_decay}: the layers of {name} cannot be numbered; "
            "must be null"
        )
    return group_parameters(net, net.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]


def _layers_of_transformers(net: nn.Module, blocks: list[str]) -> dict[str, int]:
    """Layer number of each parameter; parameters between two blocks belong to the first of them."""
    # In a `TransformersClassifier`, the head is next to the encoder, as `model.vit` and
    # `model.classifier`.
    encoder = ".".join(blocks[0].split(".")[:2])
    layers = {}
    number = 0
    for name, _ in net.named_parameters():
        for index, block in enumerate(blocks):
            if name.startswith(f"{block}."):
                number = index + 1
        is_head = number > 0 and not name.startswith(f"{encoder}.")
        layers[name] = len(blocks) + 1 if is_head else number
    return layers


def scaled_lr(lr: float, *, global_batch: int, lr_base_batch: int | None = None) -> float:
    """Learning rate proportional to the global batch, as in timm and DeiT.

    Args:
        lr: learning rate for `lr_base_batch` images.
        global_batch: images per optimizer step: batch size x processes x accumulated batches.
        lr_base_batch: images per step for which `lr` is meant; None = `lr` is used for any batch.

    Raises:
        UsageError: `lr_base_batch` is not an integer of at least 1.
    """
    if lr_base_batch is None:
        return lr
    check_int("optimizer.lr_base_batch", lr_base_batch, 1)
    return lr * (global_batch / lr_base_batch)


def build_optimizer(
    net: nn.Module,
    *,
    opt: str = "adamw",
    lr: float,
    weight_decay: float,
    scale_lr_factor: float = 1.0,
    layer_decay: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build one of timm's optimizers by name, with the groups of `parameter_groups`.

    Args:
        net: the net to train.
        opt: a name of `timm.optim.list_optimizers()`.
        lr: base learning rate.
        weight_decay: weight decay of weights.
        scale_lr_factor: learning rate of the scales relative to `lr`.
        layer_decay: see `parameter_groups`; in (0, 1].
        options: further arguments of the optimizer (`betas`, `eps`, `momentum`). AdamW and Adam are
            `fused` if the net is not sharded and the options allow it.

    Raises:
        UsageError: the optimizer is unknown or refuses the options, a number is out of range, or
            the layers of the net cannot be numbered for `layer_decay`.
    """
    check_number("optimizer.lr", lr, 0, exclusive_lowest=True)
    check_number("optimizer.scale_lr_factor", scale_lr_factor, 0, exclusive_lowest=True)
    check_number("optimizer.weight_decay", weight_decay, 0)
    names = [str(name) for name in timm.optim.list_optimizers()]
    if str(opt).lower() not in names:
        raise UsageError(unknown_message(f"optimizer.opt={opt!r}", str(opt), names))
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"optimizer.{name}={value!r}: must be a finite number")
    groups = parameter_groups(
        net, weight_decay=weight_decay, scale_lr_factor=scale_lr_factor, layer_decay=layer_decay
    )
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    settings = [f"optimizer.{name}={value!r}" for name, value in {**options, "opt": opt}.items()]
    is_sharded = any(type(parameter) is not nn.Parameter for parameter in net.parameters())
    has_other_form = options.get("foreach") or options.get("differentiable")
    if opt.lower() in _FUSED and not is_sharded and not has_other_form:
        options.setdefault("fused", True)  # torch updates all parameters in one operation
    try:
        optimizer = timm.optim.create_optimizer_v2(
            groups, opt=opt, lr=lr, weight_decay=0.0, **options
        )
    except (TypeError, ValueError, LookupError, AssertionError, RuntimeError) as error:
        raise UsageError(
            f"{', '.join(settings)}: do not work together ({error}); "
            "conf/optimizer has values that do"
        ) from error
    # Otherwise torch passes the factor of a gradient scaler to a fused optimizer, and Lightning
    # refuses to clip gradients.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def check_phases(warmup_epochs: float, cooldown_epochs: float, epochs: int) -> None:
    """Check that warm-up and cool-down leave some of the epochs to the cosine.

    Raises:
        UsageError: one of them is negative, or they are too long.
    """
    check_number("scheduler.warmup_epochs", warmup_epochs, 0, below=epochs)
    check_number("scheduler.cooldown_epochs", cooldown_epochs, 0, below=epochs - warmup_epochs)


def scheduler_factory(
    *,
    interval: str = "step",
    warmup_epochs: float = 0.0,
    cooldown_epochs: float = 0.0,
    **settings: Any,
) -> SchedulerFactory:
    """Make a function that builds a cosine schedule whose parts are measured in epochs.

    Args:
        interval: `epoch` or `step`, after which the learning rate changes.
        warmup_epochs: length of the warm-up.
        cooldown_epochs: number of last epochs, at the lowest learning rate.
        settings: `min_lr` and `warmup_lr` of `cosine_schedule`.

    Returns:
        A function of the optimizer, the number of epochs and the steps per epoch, which returns the
        schedule and its interval, and raises `UsageError` if `check_phases` does.

    Raises:
        UsageError: `interval` has another value, or a fraction of an epoch does not fit it.
    """
    check_choice("scheduler.interval", interval, ("epoch", "step"))
    for name, num_epochs in (("warmup", warmup_epochs), ("cooldown", cooldown_epochs)):
        if interval == "epoch" and num_epochs % 1:
            raise UsageError(
                f"scheduler.{name}_epochs={num_epochs}: must be an integer with "
                "scheduler.interval=epoch; scheduler.interval=step accepts fractions"
            )

    def build_schedule(
        optimizer: torch.optim.Optimizer, epochs: int, steps: int
    ) -> tuple[Scheduler, str]:
        check_phases(warmup_epochs, cooldown_epochs, epochs)
        periods_per_epoch = 1 if interval == "epoch" else steps
        schedule = cosine_schedule(
            optimizer,
            periods=int((epochs - cooldown_epochs) * periods_per_epoch),
            warmup=int(warmup_epochs * periods_per_epoch),
            interval=interval,
            **settings,
        )
        return schedule, interval

    return build_schedule


def cosine_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    periods: int,
    warmup: int = 0,
    min_lr: float = 1e-5,
    warmup_lr: float = 1e-6,
    interval: str = "epoch",
) -> CosineLRScheduler:
    """Timm's cosine schedule with linear warm-up.

    The warm-up does not shift the cosine, and the learning rate stays at `min_lr` after the cosine.

    Args:
        optimizer: the optimizer; the `lr` of each group is its peak learning rate.
        periods: length of the cosine, in epochs or steps.
        warmup: length of the warm-up, in epochs or steps.
        min_lr: learning rate at the end, before `lr_scale`.
        warmup_lr: learning rate at the start of the warm-up, before `lr_scale`.
        interval: `epoch` or `step`.
    """
    for group in optimizer.param_groups:
        # timm multiplies by lr_scale in every update, so the initial learning rate must not include
        # it.
        group["initial_lr"] = group["lr"] / group.get("lr_scale", 1.0)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(periods, 1),
        lr_min=min_lr,
        warmup_t=warmup,
        warmup_lr_init=warmup_lr,
        t_in_epochs=interval == "epoch",
    )
