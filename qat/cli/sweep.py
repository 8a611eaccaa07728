"""Sweeps (`-m`): Hydra callbacks, the summary at the end, and `analyze.py sweep=DIR`.

Nothing heavy is imported. Jobs may run in other processes and on other machines. A job that fails
also writes its error to a separate file, because `results.json` may be from an earlier run.
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

# Error of a job that requests several processes on this machine.
SEVERAL_PROCESSES = (
    "trainer.devices={!r}: a job of a sweep (-m) has one process on this machine; must be 1, "
    "or use hydra/launcher=slurm_8gpu trainer=slurm; submitit then starts one process per GPU"
)
# File in a job's folder with the error of the job; it contains `KILLED_MESSAGE` until the job ends.
ERROR_FILE = Path(".hydra") / "error.txt"
KILLED_MESSAGE = "the job was killed, or is still running"
_running_sweeps: list[SweepCallback] = []
# Messages of failed jobs, from this process or read from files of other processes.
failures: list[str] = []


class SweepCallback(Callback):
    """Locks directories, and records errors of jobs; jobs in other processes have copies of it."""

    def __init__(self) -> None:
        self.folder = ""  # directory of the sweep
        self.report = True
        self._num_failures = 0  # failures before the current job

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Lock the directory of a single run before Hydra writes there."""
        _lock_directory(config, config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Lock the directory of a sweep, which may contain jobs of an earlier start of the sweep.

        With `resume`, optuna draws the same settings again, so that these jobs continue.
        """
        _lock_directory(config, config.hydra.sweep.dir)
        self.folder = str(Path(config.hydra.sweep.dir).absolute())
        self.report = config.report
        # Save this file here, because not all sweepers do.
        OmegaConf.save(config, Path(self.folder) / "multirun.yaml")
        _running_sweeps.append(self)
        if "optuna" in config.hydra.sweeper._target_:
            # At level INFO, alembic lists its plugins.
            logging.getLogger("alembic").setLevel(logging.WARNING)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """In a sweep, record that the job has not ended."""
        self._num_failures = len(failures)
        if self.folder and ranks.is_first():
            _record_error(Path(config.hydra.runtime.output_dir), KILLED_MESSAGE)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ARG002
        """In a sweep, record the error of the job, or that the job has no error."""
        errors = failures[self._num_failures :]
        if job_return.status == JobStatus.FAILED:
            error = job_return._return_value
            errors = [f"{type(error).__name__}: {error}"]
        if self.folder:
            message = errors[0] if errors else ""
            _record_error(Path(config.hydra.runtime.output_dir), message)


def _lock_directory(config: DictConfig, folder: str) -> None:
    """Check the processes and the directory of a command, and lock the directory.

    Hydra turns errors of its callbacks into warnings, so after an error, this function itself ends
    the process.
    """
    try:
        _check_processes(config)
        if config.run_dir != "":  # `run_dir.lock` refuses an empty name
            check_path("run_dir", config.run_dir)
        run_dir.lock(folder)
        log_file = Path(folder, f"{config.hydra.job.name}.log")
        if log_file.exists() and not log_file.is_file():
            raise UsageError(f"run_dir={folder!r}: {log_file.name} exists and must be a file")
    except UsageError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(
            f"error: run_dir={folder!r}: must be a folder that exists or can be created "
            f"({error.strerror})"
        )


def _check_processes(config: DictConfig) -> None:
    """Raise `UsageError` if jobs of a sweep need several processes on this machine."""
    is_local = "submitit" not in config.hydra.launcher._target_
    trainer = config.get("trainer") or {}
    if config.hydra.mode == RunMode.MULTIRUN and is_local and ranks.processes_to_start(trainer):
        raise UsageError(SEVERAL_PROCESSES.format(trainer["devices"]))


def sweep_result(value: float | None) -> float | None:
    """Convert the result of a job for the sweeper.

    A failed job has the result NaN. For optuna, NaN is replaced by None, because optuna would end
    the sweep at NaN.
    """
    if value is None or not math.isnan(value):
        return value
    is_optuna = False
    if HydraConfig.initialized():
        is_optuna = "optuna" in str(HydraConfig.get().sweeper._target_)
    return None if is_optuna else value


def summarize() -> None:
    """If this process ran a sweep, report its results, and unlock its directory."""
    if not _running_sweeps or not ranks.is_first():
        return
    callback = _running_sweeps.pop()
    folder = Path(callback.folder)
    errors = {}
    for path in folder.rglob(str(ERROR_FILE)):
        if path.is_file():
            job = str(path.parents[1].relative_to(folder))
            errors[job] = read_file(path).decode()
    failures.extend(errors.values())
    if any(folder.rglob(".hydra")):
        from qat.report.sweep import publish

        publish(folder, report=callback.report, refused=errors)
    run_dir.unlock(callback.folder)


def gather_sweep(cfg: DictConfig) -> None:
    """Print the results of the jobs below `cfg.sweep`; write a table and, if `report`, a page.

    This is `analyze.py sweep=DIR`.

    Raises:
        UsageError: there are no jobs; or `ckpt`, `run` or `analysis` is set, too.
    """
    from qat.report.sweep import publish

    if any(cfg.get(name) is not None for name in ("ckpt", "run", "analysis")):
        raise UsageError(
            f"sweep={cfg.sweep!r}: only gathers results; leave ckpt, run and analysis out"
        )
    publish(Path(cfg.sweep), report=cfg.report)


def _record_error(folder: Path, error: str) -> None:
    """Write the error of a job to its folder; an empty text removes the file."""
    path = folder / ERROR_FILE
    # If the disk is full, the job itself reports that.
    with contextlib.suppress(OSError):
        if error:
            path.write_text(printable(" ".join(error.split())), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
