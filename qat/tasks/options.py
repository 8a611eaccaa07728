"""Switches that change how a step is computed, not what it computes: compiled nets, memory, precision, shared weights."""

from __future__ import annotations

import logging

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat.errors import UsageError
from qat.lit import Teacher
from qat.lit.compiled import RECOMPUTATION, can_recompute, compile_in_place
from qat.lit.parallel import SHARDED
from qat.losses import CompositeLoss
from qat.nn.execution import set_execution
from qat.spec import QuantRecipe
from qat.tasks.checks import check_sharding

log = logging.getLogger(__name__)

COMPILE = (True, False, "auto")
HALF_WEIGHTS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


def use_less_memory(cfg: DictConfig, net: nn.Module) -> None:
    """Under `memory=recompute` keep no probabilities, under `model.grad_checkpointing=true` only what enters each block.

    Raises:
        UsageError: the model cannot do the latter.
    """
    set_execution(net, memory=cfg.memory)
    if not OmegaConf.select(cfg, "model.grad_checkpointing"):
        return
    try:
        net.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    except (AttributeError, TypeError, AssertionError) as error:
        raise UsageError(f"model.grad_checkpointing=true: {cfg.model.name} cannot do that; must be false") from error


def check_options(cfg: DictConfig, recipe: QuantRecipe, loss: CompositeLoss) -> None:
    """Raise `UsageError` if steps cannot be computed as the settings say.

    Quantized nets need float masters: a step of 1e-3 of a weight is lost in 8 bits of mantissa, and no code ever changes.
    """
    precision, strategy = str(cfg.trainer.precision), f"trainer.strategy={SHARDED!r}"
    if recipe.name != "fp" and precision in HALF_WEIGHTS:
        raise UsageError(
            f"trainer.precision={precision!r}: a quantized net needs float weights; must be one of 32-true, bf16-mixed, 16-mixed, 64-true"
        )
    if cfg.trainer.get("strategy") == SHARDED:
        if cfg.compile is True:
            raise UsageError(f"compile=true: {strategy} gathers weights in the middle of the graph; must be false")
        if precision == "16-mixed":
            raise UsageError(f"trainer.precision={precision!r}: {strategy} has no scaler of gradients; must be 32-true or bf16-mixed")
        for name, term in loss.terms.items():
            check_sharding(cfg, f"the loss term {name}", term)


def compiles(cfg: DictConfig) -> bool:
    """Whether `compile` asks for compiled nets; `auto` does on CUDA, unless the processes share the weights.

    Raises:
        UsageError: `compile` is none of `COMPILE`.
    """
    asked = cfg.get("compile", False)
    if asked not in COMPILE:
        raise UsageError(f"compile={asked!r}: must be one of true, false, auto")
    if asked != "auto":
        return bool(asked)
    on_cuda = torch.cuda.is_available() and str(cfg.trainer.get("accelerator", "auto")) in {"auto", "gpu", "cuda"}
    return on_cuda and cfg.trainer.get("strategy") != SHARDED


def compile_nets(cfg: DictConfig, net: nn.Module, teacher: Teacher | None) -> None:
    """Compile student and teacher in place, each as one graph, where `compiles` says so; names in state dicts stay what they are.

    One operation is compiled first: where torch cannot, `auto` leaves nets eager.

    Raises:
        UsageError: torch cannot compile here, and `compile` is true.
    """
    if not compiles(cfg):
        return
    device = next(net.parameters()).device
    try:
        torch.compile(torch.square)(torch.zeros(2, device=device))
    except Exception as error:
        why = f"torch cannot compile for {device.type} here ({str(error).strip().partition(chr(10))[0]})"
        if cfg.compile is True:
            raise UsageError(f"compile=true: {why}; must be false") from error
        log.warning("compile=auto: nets are not compiled: %s", why)
        return
    recompute = OmegaConf.select(cfg, "memory") == "recompute"
    if recompute and not can_recompute():
        log.warning("memory=recompute: torch %s has no %s; its compiler keeps what it would keep anyway", torch.__version__, RECOMPUTATION)
    torch.compiler.reset()  # nets of a sweep's earlier jobs count towards the limit of graphs
    compile_in_place(net, recompute=recompute)
    if teacher is not None:
        teacher.compile()
