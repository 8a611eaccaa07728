"""Sweeps (`-m`): Hydra's callbacks around jobs, the summary, and `analyze.py sweep=DIR`.

Jobs may run in other processes and on other machines, so a failed job writes its error to a file
of its own: its `results.json` may be of an earlier run. Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qat.errors import UsageError
from qat.launch import ranks, run_dir
from qat.tasks.settings import check_path
from qat.utils.text import printable, read_file

log = logging.getLogger(__name__)

# Error of a job that asks for several processes.
SEVERAL = (
    "trainer.devices={!r}: a job of a sweep (-m) has one process on this machine; must be 1, "
    "or hydra/launcher=slurm_8gpu trainer=slurm, with which submitit starts a process a GPU"
)
# Error of a job that has not ended well, in a file in its folder. It begins with KILLED.
ERROR = Path(".hydra") / "error.txt"
KILLED = "it was killed, or is still going"
_running: list[SweepCallback] = []
# Messages of failed jobs, of this process or read from their files.
failures: list[str] = []


class SweepCallback(Callback):
    """Hydra's callback of a command; it is pickled to the processes of a sweep's jobs."""

    def __init__(self) -> None:
        self.folder = ""  # the directory of the sweep; empty for a single run
        self.report = True
        self._failed_before = 0

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Lock the run directory before Hydra writes into it."""
        _enter(config, config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Lock the directory of the sweep, and prepare its summary."""
        _enter(config, config.hydra.sweep.dir)
        self.folder = str(Path(config.hydra.sweep.dir).absolute())
        self.report = config.report
        # Not all sweepers write it.
        OmegaConf.save(config, Path(self.folder) / "multirun.yaml")
        _running.append(self)
        if "optuna" in config.hydra.sweeper._target_:
            # alembic announces its plugins.
            logging.getLogger("alembic").setLevel(logging.WARNING)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Note that the job has begun and not ended."""
        self._failed_before = len(failures)
        if self.folder and ranks.is_first():
            _note_error(Path(config.hydra.runtime.output_dir), KILLED)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ARG002
        """Note the error of the job, if it failed."""
        messages = failures[self._failed_before :]
        if job_return.status == JobStatus.FAILED:
            error = job_return._return_value
            messages = [f"{type(error).__name__}: {error}"]
        if self.folder:
            _note_error(Path(config.hydra.runtime.output_dir), messages[0] if messages else "")


def _enter(config: DictConfig, folder: str) -> None:
    """Lock the directory of a command; exit on a mistake, of which Hydra would only warn."""
    try:
        _check_processes(config)
        if config.run_dir != "":  # `run_dir.lock` refuses an empty one
            check_path("run_dir", config.run_dir)
        run_dir.lock(folder)
        log_file = Path(folder, f"{config.hydra.job.name}.log")
        if log_file.exists() and not log_file.is_file():
            raise UsageError(f"run_dir={folder!r}: {log_file.name} is there and must be a file")
    except UsageError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(
            f"error: run_dir={folder!r}: must be a folder that is or can be made ({error.strerror})"
        )


def _check_processes(config: DictConfig) -> None:
    """Raise `UsageError` on jobs of a sweep that need several processes on this machine."""
    if config.hydra.mode != RunMode.MULTIRUN or "submitit" in config.hydra.launcher._target_:
        return
    trainer = config.get("trainer") or {}
    if ranks.processes_to_start(trainer):
        raise UsageError(SEVERAL.format(trainer["devices"]))


def reported(value: float | None) -> float | None:
    """The result of a job for the sweeper; None instead of NaN for optuna.

    NaN marks a failed job, and optuna would end the whole sweep with a traceback.
    """
    if value is None or not math.isnan(value) or not HydraConfig.initialized():
        return value
    is_optuna = "optuna" in str(HydraConfig.get().sweeper._target_)
    return None if is_optuna else value


def summarize() -> None:
    """Log the results of the sweep of this process, if any, and write its table and page."""
    if not _running or not ranks.is_first():
        return
    callback = _running.pop()
    folder = Path(callback.folder)
    errors = {}
    for path in folder.rglob(str(ERROR)):
        if path.is_file():
            job = str(path.parents[1].relative_to(folder))
            errors[job] = read_file(path).decode()
    failures.extend(errors.values())
    if any(folder.rglob(".hydra")):
        from qat.report.sweep import publish

        publish(folder, report=callback.report, refused=errors)
    run_dir.unlock(callback.folder)


def gather_sweep(cfg: DictConfig) -> None:
    """Gather the jobs below `cfg.sweep`: `analyze.py sweep=DIR`.

    Raises:
        UsageError: the folder has no jobs, or another action is set as well.
    """
    from qat.report.sweep import publish

    if any(cfg.get(name) is not None for name in ("ckpt", "run", "analysis")):
        raise UsageError(
            f"sweep={cfg.sweep!r}: only gathers results; leave ckpt, run and analysis out"
        )
    publish(Path(cfg.sweep), report=cfg.report)


def _note_error(folder: Path, error: str) -> None:
    """Write the error of a job; delete it if the text is empty."""
    path = folder / ERROR
    with contextlib.suppress(OSError):  # the job reports a full disk
        if error:
            path.write_text(printable(" ".join(error.split())), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
