"""Searches of optuna: their lines on the terminal, and where a search without a good trial ends.

Nothing of a study is stored: its sampler has a seed, jobs that are done return their values again, so the same command draws the same
trials, and `resume` goes on with each in its own folder. (The databases of optuna 2.10, the last that Hydra's sweeper takes, fail beside
SQLAlchemy 2.)
"""

from __future__ import annotations

import logging
from typing import Any

import optuna
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, open_dict, read_write


class MemoryStorage(optuna.storages.InMemoryStorage):
    """Ends a search without a good trial in one line; optuna's own error would be a traceback."""

    def get_best_trial(self, study_id: int) -> Any:
        """Of a study.

        Raises:
            CompactHydraException: all trials failed.
        """
        try:
            return super().get_best_trial(study_id)
        except ValueError as error:
            raise CompactHydraException("error: no trial of the study came to an end") from error


def prepare(config: DictConfig) -> None:
    """Have the sweeper use `MemoryStorage` unless the command names a storage, and leave out log lines that say nothing about the sweep.

    Args:
        config: of the sweep, before Hydra has built the sweeper from it; changed in place.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweeper_log = logging.getLogger("hydra_plugins.hydra_optuna_sweeper._impl")
    sweeper_log.addFilter(lambda record: not str(record.msg).startswith("Failed experiment: Return value must be float-castable"))
    if config.hydra.sweeper.storage is None:
        with read_write(config), open_dict(config):
            config.hydra.sweeper.storage = {"_target_": f"{__name__}.{MemoryStorage.__name__}"}
