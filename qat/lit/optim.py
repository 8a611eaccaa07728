"""Optimizer groups and learning-rate schedules, from timm."""

from __future__ import annotations

from typing import Any

import timm.optim
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from qat.errors import UsageError
from qat.nn import QkrAttention
from qat.quantizers import Quantizer
from qat.spec import check_choice, check_number

INTERVALS = ("epoch", "step")


def quantizer_parameters(net: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Step sizes, and offsets, of all quantizers of a net."""
    scales: set[nn.Parameter] = set()
    offsets: set[nn.Parameter] = set()
    for module in net.modules():
        if isinstance(module, Quantizer):
            for name, parameter in module.named_parameters(recurse=False):
                (offsets if name.startswith("offset") else scales).add(parameter)
        if isinstance(module, QkrAttention) and module.product_offset is not None:
            offsets.add(module.product_offset)
    return scales, offsets


def parameter_groups(net: nn.Module, *, weight_decay: float, scale_lr_factor: float = 1.0) -> list[dict[str, Any]]:
    """Three groups: weights with decay; biases, norms, tokens and offsets without; scales without, at their own rate.

    Source: OFQ's recipe skips decay for 1-D tensors, biases, position embedding and tokens, hence for scales and offsets.

    Args:
        net: the net to train.
        weight_decay: of the first group.
        scale_lr_factor: learning rate of the scales relative to the others'.

    Returns:
        Groups for an optimizer; `lr_scale` is the key by which timm's schedulers scale a group's rate.
    """
    scales, offsets = quantizer_parameters(net)
    no_decay_names = net.no_weight_decay() if hasattr(net, "no_weight_decay") else set()  # type: ignore[operator]
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "scales": []}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name in no_decay_names or parameter in offsets
        groups["scales" if parameter in scales else "no_decay" if plain else "decay"].append(parameter)
    settings = {"decay": (weight_decay, 1.0), "no_decay": (0.0, 1.0), "scales": (0.0, scale_lr_factor)}
    return [
        {"params": ps, "weight_decay": settings[name][0], "lr_scale": settings[name][1], "name": name} for name, ps in groups.items() if ps
    ]


def build_optimizer(
    net: nn.Module, *, opt: str = "adamw", lr: float, weight_decay: float, scale_lr_factor: float = 1.0, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer of timm's by name, over `parameter_groups`.

    Args:
        net: the net to train.
        opt: a name of `timm.optim.list_optimizers()`.
        lr: base learning rate.
        weight_decay: of weights.
        scale_lr_factor: learning rate of the scales relative to `lr`.
        options: further arguments of the optimizer (`betas`, `eps`, `momentum`).

    Raises:
        UsageError: unknown optimizer, or a rate that is not positive.
    """
    check_number("optimizer.lr", lr, 0, above=True)
    check_number("optimizer.scale_lr_factor", scale_lr_factor, 0, above=True)
    check_number("optimizer.weight_decay", weight_decay, 0)
    groups = parameter_groups(net, weight_decay=weight_decay, scale_lr_factor=scale_lr_factor)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    try:
        return timm.optim.create_optimizer_v2(groups, opt=opt, lr=lr, weight_decay=0.0, **options)
    except (ValueError, KeyError, AssertionError) as error:
        raise UsageError(f"optimizer.opt={opt!r}: timm has no such optimizer ({error})") from error
    except TypeError as error:
        raise UsageError(f"optimizer.opt={opt!r} does not take {options} ({error})") from error


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
        warmup: length of the warm-up, likewise.
        min_lr: rate at the end.
        warmup_lr: rate at the start of the warm-up.
        interval: `epoch` or `step`.

    Raises:
        UsageError: unknown interval, or a warm-up as long as the schedule.
    """
    check_choice("scheduler.interval", interval, INTERVALS)
    if periods <= warmup:
        raise UsageError(f"scheduler.warmup_epochs: a warm-up of {warmup} {interval}s leaves nothing of a schedule of {periods}")
    for group in optimizer.param_groups:
        # timm multiplies by lr_scale in every update: the base it starts from must not hold it already.
        group["initial_lr"] = group["lr"] / group.get("lr_scale", 1.0)
    return CosineLRScheduler(
        optimizer, t_initial=periods, lr_min=min_lr, warmup_t=warmup, warmup_lr_init=warmup_lr, t_in_epochs=interval == "epoch"
    )
