"""The steps of `ptq.py` between calibration and evaluation: `ptq.method` may change the weights, `search=...` the scales."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from qat.errors import UsageError
from qat.lit.accuracy import evaluate
from qat.model.ptq_spec import PtqRecipe
from qat.model.sites import iter_quantizers
from qat.ptq import in_float
from qat.ptq.compensate import compensate
from qat.ptq.distributed import Ranks
from qat.ptq.fitness import logits_of
from qat.ptq.reconstruct import STATE_NAME, ReconstructSettings, reconstruct, split_batches
from qat.ptq.search import SearchOptions, search
from qat.ptq.search_settings import SearchSettings
from qat.ptq.state import STATE
from qat.ptq.vector import scale_vectors
from qat.tasks import build
from qat.tasks.predict import EvaluatedNet

log = logging.getLogger(__name__)
# Fits a calibrated net to a float one on calibration images, in place; gives what `results.json` says of it.
Fitter = Callable[[nn.Module, nn.Module, list[Tensor], Trainer], dict[str, Any]]


def build_search(cfg: DictConfig) -> SearchSettings | None:
    """The settings of `cfg.search`, None where there is no search.

    Raises:
        UsageError: it has a key that is no setting, or a value that cannot work.
    """
    states = (STATE, f"{STATE_NAME}.ckpt")
    if cfg.resume is True and not any((Path(cfg.run_dir) / name).is_file() for name in states):
        raise UsageError(
            f"resume=true: run_dir={str(cfg.run_dir)!r} has no {' and no '.join(states)}; resume=auto starts where there is none"
        )
    settings = build.plain(OmegaConf.select(cfg, "search"))
    if not settings:
        return None
    return build.settings_of(SearchSettings, "search", settings)


def check_targets(settings: SearchSettings | None, net: nn.Module) -> None:
    """Raise `UsageError` if `search.targets` match nothing of a converted net: its calibration would be for nothing."""
    if settings is None:
        return
    scale_vectors(net, settings.targets, dict.fromkeys((site.name for site in iter_quantizers(net)), 0))


def run_search(
    cfg: DictConfig,
    settings: SearchSettings | None,
    subject: EvaluatedNet,
    batches: list[Tensor],
    trainer: Trainer,
    ranks: Ranks,
    *,
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Search on a calibrated net, in place; gives what `results.json` says of it, nothing where there is no search.

    Args:
        cfg: the job's config; `search.csv` and `search.ckpt` go to its `run_dir`.
        settings: see `build_search`.
        subject: the net, which is on its device.
        batches: calibration images, the same in every process.
        trainer: whose device validation images go to.
        ranks: processes that share the work.
        teacher: the float net whose logits are the targets; None = the net itself in float.
    """
    if settings is None:
        return {}
    net, data = subject.net.eval(), subject.data
    followed = net if teacher is None else teacher.to(trainer.strategy.root_device).eval()
    with torch.no_grad(), in_float(followed):
        targets = [logits_of(followed, batch, settings.micro_batch) for batch in batches]

    def accuracy() -> float:
        device = trainer.strategy.root_device
        return evaluate(net, data.val_dataloader(), data.settings.num_classes, device)["top1"]

    options = SearchOptions(group=ranks.group)
    found = search(net, batches, targets, settings, run_dir=cfg.run_dir, resume=bool(cfg.resume), validate=accuracy, options=options)
    log.info("search: fitness %.6g to %.6g in %.1f s", found.fitness_before, found.fitness, found.seconds)
    return {"search": found.to_dict()}


def build_fitter(cfg: DictConfig, recipe: PtqRecipe | None, batches: list[Tensor], trainer: Trainer) -> Fitter | None:
    """What `ptq.method` asks for, checked; None where the weights stay.

    Args:
        cfg: the job's config.
        recipe: None under `ptq=keep`.
        batches: calibration images.
        trainer: of the run.

    Raises:
        UsageError: a setting cannot work, there are fewer images than a batch, or several devices.
    """
    settings = build.settings_of(ReconstructSettings, "ptq.reconstruct", build.plain(cfg.ptq).get("reconstruct") or {})
    if recipe is None or recipe.method == "calibrate":
        return None
    if trainer.world_size > 1:
        raise UsageError(f"trainer.devices={trainer.world_size}: must be 1 with ptq.method={recipe.method}")
    if recipe.method == "compensate":
        return _compensation(recipe)
    split_batches(torch.cat(batches), settings.batch)
    return _reconstruction(cfg, settings)


def _compensation(recipe: PtqRecipe) -> Fitter:
    def fit(net: nn.Module, reference: nn.Module, batches: list[Tensor], trainer: Trainer) -> dict[str, Any]:
        began = time.monotonic()
        done = compensate(net, reference, batches, matrix=recipe.compensation == "matrix")
        return {"compensation": dataclasses.asdict(done) | {"seconds": round(time.monotonic() - began, 1)}}

    return fit


def _reconstruction(cfg: DictConfig, settings: ReconstructSettings) -> Fitter:
    def fit(net: nn.Module, reference: nn.Module, batches: list[Tensor], trainer: Trainer) -> dict[str, Any]:
        # The closed form first: what it finds at once need not be learned.
        compensate(net, reference, batches)
        context = trainer.precision_plugin.forward_context
        place = {"run_dir": cfg.run_dir, "resume": bool(cfg.resume)}
        done = reconstruct(net, reference, torch.cat(batches), settings, context=context, **place)
        return {"reconstruction": dataclasses.asdict(done)}

    return fit
