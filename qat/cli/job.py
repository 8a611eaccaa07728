"""Run one job of a command in a locked run directory, and report how it ended."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qat.cli import sweep
from qat.cli.arguments import to_hydra
from qat.cli.mistakes import error_line
from qat.errors import UsageError
from qat.launch import ranks, run_dir, signals, slurm
from qat.launch.signals import Preempted
from qat.tasks import settings
from qat.tasks.conf import command_words
from qat.utils.validate import check_choice

log = logging.getLogger(__name__)

FULL_ERROR = "HYDRA_FULL_ERROR"  # 1 = tracebacks
# Settings that are added to a command to resume it.
RESUME_SETTINGS = {"resume", "run_dir"}
# All processes often fail with the same error, which only the first process should report. So the
# others wait this many seconds before they report an error.
FIRST_REPORTS_S = 10


def run_task(
    cfg: DictConfig, *, with_traceback: bool = False, command: Sequence[str] = ()
) -> float | None:
    """Run one job in its run directory; print a known mistake as one line.

    A known mistake, or any error in a job of a sweep, is written to `results.json`, unless the
    directory contains files of another run. A single run then exits with 1; a job of a sweep
    returns NaN (None for optuna), so that the other jobs run. Other errors are raised. A stopped
    run exits, too.

    Args:
        cfg: the composed config.
        with_traceback: raise errors instead of printing them.
        command: the words that were typed.

    Returns:
        The result of the task: the number that a sweep optimizes.
    """
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if HydraConfig.initialized():
        cfg.run_dir = HydraConfig.get().runtime.output_dir
        cfg.sweep_dir = str(Path(cfg.run_dir).parent) if in_sweep else None
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    state = run_dir.RunDirState(folder)
    if not ranks.is_first():
        logging.getLogger().setLevel(logging.ERROR)
    with contextlib.ExitStack() as lock:  # until an error is recorded, too
        try:
            check_choice("command", cfg.command, tuple(settings.COMMANDS))
            _arrange_processes(cfg, in_sweep=in_sweep, with_traceback=with_traceback)
            if "resume" in cfg:
                cfg.resume = slurm.implied_resume(cfg.resume, folder, overwrite=cfg.overwrite)
            task = _find_task(cfg)
            lock.enter_context(run_dir.hold_lock(cfg.run_dir))
            with signals.handle_signals():
                return sweep.sweep_result(task(cfg))
        except Preempted as stop:
            sys.exit(_end_stopped_run(cfg, stop, state, command))
        except Exception as error:
            message_line = error_line(error)
            if with_traceback or (message_line is None and not in_sweep):
                raise
            _report_failure(cfg, error, message_line, state)
    if not in_sweep:
        sys.exit(1)
    return sweep.sweep_result(math.nan)


def _end_stopped_run(
    cfg: DictConfig, stop: Preempted, state: run_dir.RunDirState, command: Sequence[str]
) -> int:
    """Log how to resume or repeat a stopped run, or requeue its job; return the exit code."""
    folder = Path(cfg.run_dir)
    if not stop.wants_requeue and state.has_begun() and not run_dir.checkpoints(folder):
        # Recording an error allows the same command to start the run again.
        _write_error(cfg, f"stopped by {stop.name}", state)
    hint = "the same command repeats the run"
    # If the run has not begun, the directory may contain files of another run, which must not be
    # resumed.
    if "resume" in cfg and (state.has_begun() or cfg.resume or cfg.sweep_dir):
        hint = _resume_hint(command, cfg.sweep_dir or cfg.run_dir)
    return slurm.end_preempted(stop, folder, hint)


def _resume_hint(command: Sequence[str], folder: str) -> str:
    """How to resume a run: a command to paste, or only the settings to add.

    The hint has only the settings if a launcher started the run or the command is unknown.
    """
    settings_to_add = ["resume=auto", f"run_dir={folder}"]
    if not command or slurm.is_launched():
        return f"the same command resumes with {' '.join(settings_to_add)}"
    words = []
    for word in command:
        name = word.partition("=")[0].lstrip("+")
        if name not in RESUME_SETTINGS:
            words.append(word)
    return f"to resume: {shlex.join([*words, *settings_to_add])}"


def _report_failure(
    cfg: DictConfig, error: Exception, message_line: str | None, state: run_dir.RunDirState
) -> None:
    """Report an error in the log and, if allowed, in the run directory.

    Args:
        cfg: the composed config.
        error: the error that ended the task.
        message_line: the line to print, see `error_line`; None for an unknown error.
        state: the run directory as it was before the task.
    """
    message = message_line or " ".join(f"{type(error).__name__}: {error}".split())
    sweep.failures.append(message)
    label = "error"
    if not ranks.is_first():
        # If the first process fails with the same error, the launcher ends this process during the
        # wait.
        time.sleep(FIRST_REPORTS_S)
        label = f"error in process {ranks.rank()}"
    log.error("%s: %s", label, message, exc_info=error if message_line is None else None)
    if not isinstance(error, run_dir.UsedError):
        _write_error(cfg, message, state)


def _find_task(cfg: DictConfig) -> Callable[[DictConfig], float | None]:
    """The function that does the work of a command."""
    if cfg.get("sweep") is not None:
        return sweep.gather_sweep
    task = "evaluate" if cfg.command == "eval" else cfg.command
    return getattr(importlib.import_module(f"qat.tasks.{task}"), task)


def _arrange_processes(cfg: DictConfig, *, in_sweep: bool, with_traceback: bool) -> None:
    """Make this process one of as many as the run needs.

    If no launcher has started them, this process becomes torchrun, which does, and the function
    does not return.

    Raises:
        UsageError: a setting is invalid, or the run cannot get its processes or directory.
    """
    trainer = cfg.get("trainer") or {}
    slurm.check_processes(trainer)
    slurm.set_address()
    # `analyze` and predictions refuse several devices themselves, and `export` has no trainer. No
    # processes are started for them.
    has_one_process = cfg.command in {"analyze", "export"} or cfg.get("predict") is not None
    num_processes = 0
    if not has_one_process:
        num_processes = ranks.processes_to_start(trainer)
    if num_processes:
        if in_sweep:
            raise UsageError(sweep.SEVERAL_PROCESSES.format(trainer["devices"]))
        settings.check(cfg)
        run_dir.lock_for_ranks(cfg.run_dir)
        os.environ[FULL_ERROR] = str(int(with_traceback))
        ranks.become_torchrun(num_processes, _command_line(cfg))


def _command_line(cfg: DictConfig) -> list[str]:
    """The command line that starts this run in other processes, with its run directory."""
    is_console_script = command_words("").startswith("qat")
    command = [cfg.command] if is_console_script else []
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("run_dir=")]
    return [sys.argv[0], *command, *arguments, *to_hydra([f"run_dir={cfg.run_dir}"])]


def _write_error(cfg: DictConfig, message: str, state: run_dir.RunDirState) -> None:
    """If allowed, write results that contain an error, and the report if the run has begun."""
    if not ranks.is_first() or not state.may_record_error():
        return
    from qat.tasks.results import write_results

    # Writing may fail for the same reason as the run, such as an unusable run directory or config.
    with contextlib.suppress(OSError, OmegaConfBaseException):
        write_results(cfg, error=message)
        if state.has_begun():
            from qat.tasks.report import report_run

            report_run(cfg)
