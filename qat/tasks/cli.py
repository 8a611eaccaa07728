"""Between Hydra and a task: run directory, one-line errors, exit codes. Imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

import datetime
import importlib
import logging
import math
import os
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from qat.errors import UsageError

log = logging.getLogger(__name__)
_failed_jobs: list[str] = []


def _run_name() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"slurm-{job}" if job else f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"


OmegaConf.register_new_resolver("run_name", _run_name, use_cache=True, replace=True)


def exit_code() -> int:
    """1 if a job of this process failed."""
    return 1 if _failed_jobs else 0


def run(task: str, cfg: DictConfig) -> float | None:
    """Call `qat.tasks.<task>.<task>(cfg)`.

    A known mistake prints one line. A single run then exits with 1; in a multirun the job writes its error to `results.json` and
    returns NaN, and the other jobs go on. Under `debug=...` or HYDRA_FULL_ERROR=1 the traceback comes through.

    Args:
        task: name of the module and of its function.
        cfg: the composed config.

    Returns:
        What the task returns: the number a sweep optimises.
    """
    _enter_run_dir(cfg)
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        function = getattr(importlib.import_module(f"qat.tasks.{task}"), task)
        result: float | None = function(cfg)
    except Exception as error:
        mistake = _mistake(error)
        if _wants_traceback(cfg) or (mistake is None and not multirun):
            raise
        message = str(mistake) if mistake is not None else f"{type(error).__name__}: {error}"
        _report(cfg, message, error if mistake is None else None)
        if not multirun:
            sys.exit(1)
        return math.nan
    return result


def _enter_run_dir(cfg: DictConfig) -> None:
    """Below here `cfg.run_dir` is the job's own directory, also in a sweep."""
    if HydraConfig.initialized():
        with open_dict(cfg):
            cfg.run_dir = HydraConfig.get().runtime.output_dir
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                cfg.sweep_dir = str(Path(cfg.run_dir).parent)  # for what its jobs share
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)


def _mistake(error: BaseException | None) -> UsageError | None:
    """The `UsageError` behind an exception: Hydra wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, UsageError):
            return error
        error = error.__cause__
    return None


def _wants_traceback(cfg: DictConfig) -> bool:
    debug = HydraConfig.initialized() and HydraConfig.get().runtime.choices.get("debug")
    return bool(debug) or os.environ.get("HYDRA_FULL_ERROR") == "1"


def _report(cfg: DictConfig, message: str, unexpected: BaseException | None) -> None:
    from qat.tasks.results import write_results

    _failed_jobs.append(message)
    log.error("error: %s", " ".join(message.split()), exc_info=unexpected)
    # Results that are there belong to an older run: a run that replaces them removes them once it is checked.
    if not (Path(cfg.run_dir) / "results.json").exists():
        write_results(cfg, error=message)
