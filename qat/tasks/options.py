"""Switches that change how a step is computed, not what it computes."""

from __future__ import annotations

import logging

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from qat.errors import UsageError
from qat.lit import Teacher
from qat.lit.compiled import RECOMPUTATION, can_recompute, compile_in_place
from qat.lit.parallel import SHARDED
from qat.losses import CompositeLoss
from qat.nn.execution import set_execution
from qat.spec import QuantRecipe
from qat.tasks.checks import check_sharding

log = logging.getLogger(__name__)

FP16 = ("16-mixed", "16-true", "16", "transformer-engine-float16")
COMPILE = (True, False, "auto")
HALF_MASTERS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


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


def check_precision(cfg: DictConfig, recipe: QuantRecipe) -> None:
    """Quantized nets need float masters: a step of 1e-3 of a weight is lost in 8 bits of mantissa, and no code ever changes.

    Raises:
        UsageError: `trainer.precision` would turn the weights of a quantized net into bf16 or fp16.
    """
    if recipe.name != "fp" and str(cfg.trainer.precision) in HALF_MASTERS:
        allowed = "32-true, bf16-mixed, 16-mixed, 64-true"
        raise UsageError(
            f"trainer.precision={cfg.trainer.precision!r}: a quantized net needs float master weights; must be one of {allowed}"
        )


def check_options(cfg: DictConfig, recipe: QuantRecipe, loss: CompositeLoss, device: torch.device) -> None:
    """Raise `UsageError` if steps cannot be computed as the settings say."""
    check_precision(cfg, recipe)
    check_sharded(cfg, loss)
    check_compiler(cfg, device)


def check_sharded(cfg: DictConfig, loss: CompositeLoss) -> None:
    """What a run whose processes share the weights cannot do.

    Raises:
        UsageError: `trainer.strategy=fsdp` with one of these.
    """
    if cfg.trainer.get("strategy") != SHARDED:
        return
    setting = f"trainer.strategy={SHARDED!r}"
    if cfg.compile is True:
        raise UsageError(f"compile=true: {setting} gathers weights in the middle of the graph; must be false")
    if str(cfg.trainer.precision) in FP16:
        raise UsageError(
            f"trainer.precision={cfg.trainer.precision!r}: {setting} has no scaler of gradients; must be one of 32-true, bf16-mixed"
        )
    for name, term in loss.terms.items():
        check_sharding(cfg, f"the loss term {name}", term)


def compiles(cfg: DictConfig) -> bool:
    """Whether `compile` asks for compiled nets; `auto` does on CUDA, unless another setting needs eager steps.

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


def check_compiler(cfg: DictConfig, device: torch.device) -> None:
    """Compile one addition where nets are to be compiled, so that a missing compiler shows at once.

    Raises:
        UsageError: torch cannot compile for `device`, and `compile` is true.
    """
    trouble = compiler_trouble(device) if compiles(cfg) else None
    if trouble and cfg.compile is True:
        raise UsageError(f"compile=true: torch cannot compile for {device.type} here ({trouble}); must be false")
    if trouble:
        log.warning("compile=auto: nets are not compiled, as torch cannot do it for %s here (%s)", device.type, trouble)


def compiler_trouble(device: torch.device) -> str | None:
    """Why torch cannot compile for a device; None = it can."""
    try:
        torch.compile(_increment)(torch.zeros(2, device=device))
    except Exception as error:
        return str(error).strip().partition("\n")[0]
    return None


def _increment(x: Tensor) -> Tensor:
    return x + 1


def compile_nets(cfg: DictConfig, net: nn.Module, teacher: Teacher | None) -> None:
    """Compile student and teacher in place, each as one graph, where `compiles` says so; names in state dicts stay what they are.

    Under `memory=recompute` the compiler keeps less for backward.
    """
    if not compiles(cfg) or (cfg.compile == "auto" and compiler_trouble(next(net.parameters()).device)):
        return
    recompute = OmegaConf.select(cfg, "memory") == "recompute"
    if recompute and not can_recompute():
        log.warning("memory=recompute: torch %s has no %s; its compiler keeps what it would keep anyway", torch.__version__, RECOMPUTATION)
    torch.compiler.reset()  # nets of a sweep's earlier jobs count towards the limit of graphs
    compile_in_place(net, recompute=recompute)
    if teacher is not None:
        teacher.compile()
