"""The first steps of every command."""

from __future__ import annotations

from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from qat import kernels
from qat.lit.quiet import quiet_libraries
from qat.tasks.build import count_classes
from qat.tasks.checks import check_trainer
from qat.tasks.hub import resolve_hub_model
from qat.tasks.settings import check as check_settings


def set_up(cfg: DictConfig) -> None:
    """Check the settings of a command, resolve what they imply, and use its kernels and seed.

    Raises:
        UsageError: an unknown setting, a value of another type, or one that cannot work.
    """
    check_settings(cfg)
    quiet_libraries()
    resolve_hub_model(cfg)
    count_classes(cfg)
    kernels.use(cfg.get("kernels", "auto"))
    if "trainer" in cfg:
        check_trainer(cfg.trainer)
    seed_everything(cfg.seed, workers=True, verbose=False)
