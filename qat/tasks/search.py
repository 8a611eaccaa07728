"""The step of `ptq.py` between calibration and evaluation: `search=...` brings the logits closer to the float ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from qat.errors import UsageError
from qat.lit.accuracy import evaluate
from qat.model.sites import iter_quantizers
from qat.ptq import in_float
from qat.ptq.distributed import Ranks
from qat.ptq.fitness import logits_of
from qat.ptq.search import SearchOptions, search
from qat.ptq.search_settings import SearchSettings
from qat.ptq.state import STATE
from qat.ptq.vector import scale_vectors
from qat.tasks import build
from qat.tasks.predict import EvaluatedNet

log = logging.getLogger(__name__)


def build_search(cfg: DictConfig) -> SearchSettings | None:
    """The settings of `cfg.search`, None where there is no search.

    Raises:
        UsageError: it has a key that is no setting, or a value that cannot work.
    """
    if cfg.resume is True and not (Path(cfg.run_dir) / STATE).is_file():
        raise UsageError(f"resume=true: run_dir={str(cfg.run_dir)!r} has no {STATE}; resume=auto starts where there is none")
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
