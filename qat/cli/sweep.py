"""Sweeps (`-m`): what Hydra calls around their jobs, the summary at the end, and `analyze.py sweep=DIR`. Imports nothing heavy.

Jobs may run in other processes and on other machines, so one that fails says so in a file: its `results.json` may be of an earlier run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qat.cli.console import NumberedFormatter, TerminalHandler
from qat.errors import UsageError
from qat.launch import lock, ranks

log = logging.getLogger(__name__)

# Below the folder of a job that has not ended well: its error, to begin with this one.
ERROR, KILLED = Path(".hydra") / "error.txt", "it was killed, or is still going"
# In the environment of a job that shares its terminal with others.
NO_BAR = "QAT_NO_PROGRESS_BAR"
_running: list[SweepCallback] = []
_refusals: list[str] = []
# What went wrong: a message for each job that failed, in this process or as the sweep has read.
failures: list[str] = []


class SweepCallback(Callback):
    """Hydra makes one for each command; it travels to wherever the jobs of a sweep run."""

    def __init__(self) -> None:
        self.folder = ""  # of the sweep
        self.varied: list[str] = []
        self.report = True
        self.resumes = False
        self._failed_before = 0

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse a directory that another run writes into, before Hydra writes there."""
        _take(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Begin the summary; a search repeats its draws, so `resume` goes on with it as with any other sweep."""
        _take(config.hydra.sweep.dir)
        self.folder = str(Path(config.hydra.sweep.dir).absolute())
        self.report, self.resumes = bool(config.get("report", True)), "resume" in config
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        self.varied = [one.get_key_element().lstrip("+~") for one in overrides if one.is_sweep_override()]
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, Path(self.folder) / "multirun.yaml")  # some sweepers do so, others do not
        _running.append(self)
        if "optuna" in config.hydra.sweeper._target_:
            logging.getLogger("alembic").setLevel(logging.WARNING)  # it announces its plugins
            self.varied += [str(name).lstrip("+~") for name in config.hydra.sweeper.params or ()]

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Note that the job began; refuse to go on with one of another setting."""
        _refusals.clear()
        if not self.folder:
            return
        folder = Path(config.hydra.runtime.output_dir)
        if ranks.is_first():
            _note_error(folder, KILLED)
        self._failed_before = len(failures)
        if config.get("resume"):
            _refusals.extend(_other_setting(folder, list(config.hydra.overrides.task), self.varied))
        if is_parallel(config.hydra):
            os.environ[NO_BAR] = "1"
            _number_lines(config.hydra.job.num)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:  # noqa: ARG002
        """Note its error."""
        failed = failures[self._failed_before :]
        if job_return.status == JobStatus.FAILED:
            failed = [f"{type(job_return._return_value).__name__}: {job_return._return_value}"]
        if self.folder:
            _note_error(Path(config.hydra.runtime.output_dir), failed[0] if failed else "")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Show its summary."""
        summarize()


def _take(run_dir: str) -> None:
    try:
        lock.take(run_dir)
    except lock.InUseError as error:
        sys.exit(f"error: {error}")


def is_parallel(hydra: HydraConf | DictConfig) -> bool:
    """True if several jobs of a sweep run on this machine at the same time and write to one terminal."""
    return hydra.mode == RunMode.MULTIRUN and "joblib" in str(hydra.launcher._target_)


def begin_job() -> int:
    """How many processes a job is to be given in any case: 1 where one that is killed would take its neighbours with it, else 0.

    Raises:
        UsageError: the job would go on with one of another setting.
    """
    if _refusals:
        raise UsageError(_refusals[0])
    if not is_parallel(HydraConfig.get()):
        return 0
    if not ranks.is_started_here():
        return 1
    _number_lines(HydraConfig.get().job.num)
    return 0


def _number_lines(number: int) -> None:
    """Put the number of the job in front of what it says on the terminal."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, TerminalHandler):
            handler.setFormatter(NumberedFormatter(number))


def reported(value: float | None) -> float | None:
    """What a job returns to the sweeper: optuna takes no NaN, the sign of a failed job, and would end the sweep with a traceback."""
    is_nan = value is not None and math.isnan(value)
    return None if is_nan and HydraConfig.initialized() and "optuna" in str(HydraConfig.get().sweeper._target_) else value


def way_on() -> str:
    """How to go on with the sweep of this process that was stopped; empty where there is none."""
    return f"; the same command goes on with resume=auto run_dir={_running[-1].folder}" if _running and _running[-1].resumes else ""


def summarize() -> None:
    """Show the results of the sweep of this process, if there was one, and write its table and page; do so once."""
    if not _running or not ranks.is_first():
        return
    callback = _running.pop()
    _running.clear()
    folder = Path(callback.folder)
    errors = {str(path.parents[1].relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob(str(ERROR))}
    failures.extend(errors.values())
    if any(folder.rglob(".hydra")):
        from qat.report.sweep import publish

        publish(folder, report=callback.report, refused=errors)
    lock.release(callback.folder)


def gather_sweep(cfg: DictConfig) -> None:
    """Gather the jobs below `cfg.sweep`: `analyze.py sweep=DIR`.

    Raises:
        UsageError: there are none, or something else is asked for as well.
    """
    from qat.report.sweep import publish

    if any(cfg.get(name) is not None for name in ("ckpt", "run", "analysis")):
        raise UsageError(f"sweep={cfg.sweep!r}: gathers runs and analyses nothing; leave ckpt, run and analysis out")
    publish(Path(cfg.sweep).expanduser(), report=cfg.report)


def _other_setting(folder: Path, overrides: list[str], varied: list[str]) -> list[str]:
    """A line if what the directory holds was given other values of the settings that the sweep varies."""
    from qat.report.sweep import overrides_of, pairs

    if not (folder / "command.json").is_file():
        return []
    had, has = overrides_of(folder), pairs(overrides)
    differ = [name for name in varied if had.get(name) != has.get(name)]
    if not differ:
        return []
    then, now = (" ".join(f"{name}={values.get(name, '(default)')}" for name in differ) for values in (had, has))
    return [
        f"resume: {folder} is of a job with {then}, this one has {now}; a sweep goes on with the same lists, others need another run_dir"
    ]


def _note_error(folder: Path, error: str) -> None:
    """Note how a job has failed; with an empty text, that it has not."""
    path = folder / ERROR
    with contextlib.suppress(OSError):  # a full disk is the job's affair
        if error:
            path.write_text(" ".join(error.split()), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
