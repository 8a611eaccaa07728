"""Sweeps (`-m`): what Hydra calls around their jobs, the summary at the end, and `analyze.py sweep=DIR`. Imports nothing heavy.

Jobs may run in other processes and on other machines, so one that fails says so in a file: its `results.json` may be of an earlier run.
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
from qat.tasks.settings import check_paths
from qat.utils.text import printable, read_file

log = logging.getLogger(__name__)

# What a job is answered that asks for several processes of this machine.
SEVERAL = (
    "trainer.devices={!r}: a job of a sweep (-m) has one process on this machine; must be 1, or hydra/launcher=slurm_8gpu trainer=slurm, "
    "with which submitit starts a process a GPU"
)
# Below the folder of a job that has not ended well: its error, to begin with this one.
ERROR, KILLED = Path(".hydra") / "error.txt", "it was killed, or is still going"
_running: list[SweepCallback] = []
# What went wrong: a message for each job that failed, in this process or as the sweep has read.
failures: list[str] = []


class SweepCallback(Callback):
    """Hydra makes one for each command; it travels to wherever the jobs of a sweep run."""

    def __init__(self) -> None:
        self.folder = ""  # of the sweep
        self.report = True
        self._failed_before = 0

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse a directory that another run writes into, before Hydra writes there."""
        _enter(config, config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Begin the summary; a search repeats its draws, so `resume` goes on with it as with any other sweep."""
        _enter(config, config.hydra.sweep.dir)
        self.folder = str(Path(config.hydra.sweep.dir).absolute())
        self.report = config.report
        OmegaConf.save(
            config, Path(self.folder) / "multirun.yaml"
        )  # some sweepers do so, others do not
        _running.append(self)
        if "optuna" in config.hydra.sweeper._target_:
            logging.getLogger("alembic").setLevel(logging.WARNING)  # it announces its plugins

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Note that the job began."""
        self._failed_before = len(failures)
        if self.folder and ranks.is_first():
            _note_error(Path(config.hydra.runtime.output_dir), KILLED)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ARG002
        """Note its error."""
        failed = failures[self._failed_before :]
        if job_return.status == JobStatus.FAILED:
            failed = [f"{type(job_return._return_value).__name__}: {job_return._return_value}"]
        if self.folder:
            _note_error(Path(config.hydra.runtime.output_dir), failed[0] if failed else "")


def _enter(config: DictConfig, folder: str) -> None:
    """Lock the directory of a command; Hydra makes warnings of what its callbacks raise, so a mistake ends the process here."""
    trainer = config.get("trainer") or {}
    try:
        if (
            config.hydra.mode == RunMode.MULTIRUN
            and "submitit" not in config.hydra.launcher._target_
            and ranks.processes_to_start(trainer)
        ):
            raise UsageError(SEVERAL.format(trainer["devices"]))
        check_paths({
            "run_dir": None if config.run_dir == "" else config.run_dir
        })  # an empty one is refused below
        run_dir.lock(folder)
        if (
            log_file := Path(folder, f"{config.hydra.job.name}.log")
        ).exists() and not log_file.is_file():
            raise UsageError(f"run_dir={folder!r}: {log_file.name} is there and must be a file")
    except UsageError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(
            f"error: run_dir={folder!r}: must be a folder that is or can be made ({error.strerror})"
        )


def reported(value: float | None) -> float | None:
    """What a job returns to the sweeper: optuna takes no NaN, the sign of a failed job, and would end the sweep with a traceback."""
    is_nan = value is not None and math.isnan(value)
    return (
        None
        if is_nan
        and HydraConfig.initialized()
        and "optuna" in str(HydraConfig.get().sweeper._target_)
        else value
    )


def summarize() -> None:
    """Show the results of the sweep of this process, if there was one, and write its table and page; do so once."""
    if not _running or not ranks.is_first():
        return
    callback = _running.pop()
    folder = Path(callback.folder)
    errors = {
        str(path.parents[1].relative_to(folder)): read_file(path).decode()
        for path in folder.rglob(str(ERROR))
        if path.is_file()
    }
    failures.extend(errors.values())
    if any(folder.rglob(".hydra")):
        from qat.report.sweep import publish

        publish(folder, report=callback.report, refused=errors)
    run_dir.unlock(callback.folder)


def gather_sweep(cfg: DictConfig) -> None:
    """Gather the jobs below `cfg.sweep`: `analyze.py sweep=DIR`.

    Raises:
        UsageError: there are none, or something else is asked for as well.
    """
    from qat.report.sweep import publish

    if any(cfg.get(name) is not None for name in ("ckpt", "run", "analysis")):
        raise UsageError(
            f"sweep={cfg.sweep!r}: only gathers results; leave ckpt, run and analysis out"
        )
    publish(Path(cfg.sweep), report=cfg.report)


def _note_error(folder: Path, error: str) -> None:
    """Note how a job has failed; with an empty text, that it has not."""
    path = folder / ERROR
    with contextlib.suppress(OSError):  # a full disk is the job's affair
        if error:
            path.write_text(printable(" ".join(error.split())), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
