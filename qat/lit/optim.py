"""Optimizer groups and learning-rate schedules, from timm."""

from __future__ import annotations

from typing import Any

import timm.optim
import torch
from timm.models import group_parameters
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from qat.errors import UsageError
from qat.model.sites import no_weight_decay, quantizer_parameters
from qat.utils.validate import check_int, check_number, unknown

GROUPS = ("decay", "no_decay", "scales")
_FUSED = {"adam", "adamw"}  # optimizers of torch that have a fused form, by timm's names


def parameter_groups(
    net: nn.Module,
    *,
    weight_decay: float,
    scale_lr_factor: float = 1.0,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Three groups: weights with decay; biases, norms, tokens and offsets without; scales without, at their own rate.

    Args:
        net: the net to train.
        weight_decay: of the first group.
        scale_lr_factor: learning rate of the scales relative to the others'.
        layer_decay: factor on the learning rate from one layer to the one before it (the head has 1); three groups for each layer.
            None = all layers alike.

    Returns:
        Groups for an optimizer; `lr_scale` is the key by which timm's schedulers scale a group's rate.

    Raises:
        UsageError: `layer_decay` is not in (0, 1], or the net is one whose layers timm does not number.
    """
    layers: dict[str, int] = {}
    if layer_decay is not None:
        check_number("optimizer.layer_decay", layer_decay, 0, above=True, highest=1)
        if not hasattr(net, "group_matcher"):
            raise UsageError(
                f"optimizer.layer_decay={layer_decay}: timm does not number the layers of {type(net).__name__}; must be null"
            )
        # As timm counts them: 0 = embedding, the highest = head.
        layers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    scales, _ = quantizer_parameters(net)
    without = no_weight_decay(net)
    last = max(layers.values(), default=0)
    groups: dict[tuple[str, int], list[nn.Parameter]] = {
        (name, layer): [] for layer in range(last + 1) for name in GROUPS
    }
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "scales" if parameter in scales else "no_decay" if name in without else "decay"
        groups[kind, layers.get(name, last)].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if kind == "decay" else 0.0,
            "lr_scale": (scale_lr_factor if kind == "scales" else 1.0)
            * (layer_decay or 1.0) ** (last - layer),
            "name": kind if layer_decay is None else f"layer{layer}_{kind}",
        }
        for (kind, layer), parameters in groups.items()
        if parameters
    ]


def scaled_lr(lr: float, *, global_batch: int, lr_base_batch: int | None = None) -> float:
    """Learning rate for the batch in use.

    Args:
        lr: the rate that is meant for `lr_base_batch` images.
        global_batch: images per optimizer step: batch size x processes x accumulated batches.
        lr_base_batch: the rate is proportional to the batch, as timm and DeiT scale it; None = `lr` holds for any batch.

    Raises:
        UsageError: the base is not an integer of at least 1.
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
    """An optimizer of timm's by name, over `parameter_groups`.

    Args:
        net: the net to train.
        opt: a name of `timm.optim.list_optimizers()`.
        lr: base learning rate.
        weight_decay: of weights.
        scale_lr_factor: learning rate of the scales relative to `lr`.
        layer_decay: see `parameter_groups`; in (0, 1].
        options: further arguments of the optimizer (`betas`, `eps`, `momentum`). AdamW and Adam are `fused` unless they say otherwise.

    Raises:
        UsageError: unknown optimizer, or a rate that is not positive.
    """
    check_number("optimizer.lr", lr, 0, above=True)
    check_number("optimizer.scale_lr_factor", scale_lr_factor, 0, above=True)
    check_number("optimizer.weight_decay", weight_decay, 0)
    known = [*map(str, timm.optim.list_optimizers())]
    if str(opt).lower() not in known:
        raise UsageError(unknown(f"optimizer.opt={opt!r}", str(opt), known))
    groups = parameter_groups(
        net, weight_decay=weight_decay, scale_lr_factor=scale_lr_factor, layer_decay=layer_decay
    )
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    given = ", ".join(
        f"optimizer.{name}={value!r}" for name, value in {**options, "opt": opt}.items()
    )
    if opt.lower() in _FUSED and all(
        type(parameter) is nn.Parameter for parameter in net.parameters()
    ):  # not where processes share them
        options.setdefault("fused", True)  # torch updates all parameters in one operation
    try:
        optimizer = timm.optim.create_optimizer_v2(
            groups, opt=opt, lr=lr, weight_decay=0.0, **options
        )
    except (TypeError, ValueError, LookupError, AssertionError, RuntimeError) as error:
        raise UsageError(
            f"{given}: do not work together ({error}); conf/optimizer has values that do"
        ) from error
    # Else torch hands a scaler's factor to a fused optimizer, and Lightning cannot clip gradients, which it has not unscaled then.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def cosine_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    periods: int,
    warmup: int = 0,
    min_lr: float = 1e-5,
    warmup_lr: float = 1e-6,
    interval: str = "epoch",
) -> CosineLRScheduler:
    """Timm's cosine with linear warm-up; the cosine is not shifted by the warm-up, and stays at `min_lr` after its end.

    Args:
        optimizer: its groups' `lr` are the peaks.
        periods: length of the cosine, in epochs or steps.
        warmup: length of the warm-up, in epochs or steps.
        min_lr: rate at the end.
        warmup_lr: rate at the start of the warm-up.
        interval: `epoch` or `step`.
    """
    for group in optimizer.param_groups:
        # timm multiplies by lr_scale in every update: the base it starts from must not hold it already.
        group["initial_lr"] = group["lr"] / group.get("lr_scale", 1.0)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(periods, 1),
        lr_min=min_lr,
        warmup_t=warmup,
        warmup_lr_init=warmup_lr,
        t_in_epochs=interval == "epoch",
    )
