"""The commands `qat train ...`, or `python train.py ...` in a clone.

They run a task in its run directory, and print a known mistake as one line. Nothing heavy is
imported here, so that `--help` is fast.
"""

from __future__ import annotations

from qat.launch import startup  # noqa: F401  (first: Ctrl-C)

# isort: split
import contextlib
import importlib
import importlib.metadata
import logging
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import qat
from qat.cli import catalog, sweep
from qat.cli.corrections import correction, refuse_flags
from qat.cli.mistakes import line_of
from qat.errors import UsageError
from qat.launch import ranks, run_dir, signals, slurm
from qat.launch.signals import Preempted
from qat.tasks import settings
from qat.tasks.conf import CONF, options, typed
from qat.utils.text import printable
from qat.utils.validate import check_choice

log = logging.getLogger(__name__)
# matplotlib announces its font cache on a fresh machine.
logging.getLogger("matplotlib").setLevel(logging.WARNING)

COMMANDS = {
    "train": "train, quantization-aware or in float",
    "eval": "accuracy of a checkpoint, or its predictions",
    "ptq": "quantize a float model without training",
    "analyze": "analyse a checkpoint",
    "export": "a file to deploy",
    "models": "the choices of model=",
    "recipes": "the choices of quant= and ptq=",
    "version": "versions of what is installed",
}
# Settings whose values are paths, written as in a shell: whole names, and last parts of names.
PATHS = {"predict", "run", "sweep", "file", "run_dir"}
PATHS_OF_GROUPS = {"ckpt", "weights", "root", "dir", "dirpath", "save_dir"}
# A quoted text, or a whole element that Hydra would read as a number or a truth value.
QUOTED = r"((['\"])(?:\\.|(?!\2).)*\2)"
NUMBER_LIKE = r"(?<![^\[(,\s])(?:[+-]?(?:[.\d][\w.+-]*|inf|nan)|true|false)(?![^\]),\s])"
ELEMENT = re.compile(f"{QUOTED}|{NUMBER_LIKE}", re.IGNORECASE)
# Values that need no quotes in Hydra's grammar, and values that use the grammar.
PLAIN = re.compile(r"[A-Za-z0-9_./:+%@-]*")
GRAMMAR = re.compile(r"['\"\[]|.*\$\{")
SWEEP = re.compile(r",|\b(choice|range|interval|glob|tag|sort|shuffle)\(")
SWEEP_OF_NUMBERS = re.compile(r"\b(range|interval)\(")
FULL_ERROR = "HYDRA_FULL_ERROR"
# Settings that the command to resume sets.
RESUMING = {"resume", "run_dir"}
# Settings that may be new keys of their group.
OPEN = re.compile(r"(quant|ptq)\.overrides|model\.args\..*")
OTHERS_WAIT_S = 10


def main() -> int:
    """The console script `qat`.

    Returns:
        The exit code.
    """
    sys.path.append(os.getcwd())  # for modules of the user, as with `python -m`
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in settings.COMMANDS:
        del sys.argv[1]
        return run(name)
    if name in {"--help", "-h"}:
        sys.stdout.write("qat COMMAND [group=choice ...] [key=value ...]\n")
        for command, description in COMMANDS.items():
            sys.stdout.write(f"  qat {command:<9}{description}\n")
        sys.stdout.write("qat COMMAND --help lists groups and settings.\n")
    elif name in {"models", "recipes"}:
        lines = catalog.models() if name == "models" else catalog.recipes()
        sys.stdout.write("\n".join(lines) + "\n")
    elif name in {"version", "--version"}:
        versions = [f"vit-qat {qat.__version__}"]
        for library in ("torch", "timm", "lightning"):
            versions.append(f"{library} {importlib.metadata.version(library)}")
        sys.stdout.write(", ".join(versions) + "\n")
    else:
        sys.stderr.write(f"error: qat {name}: must be one of {', '.join(COMMANDS)}\n")
        return 1
    return 0


def run(name: str) -> int:
    """Run a command with the arguments of the command line.

    Args:
        name: of the command, a key of `settings.COMMANDS`.

    Returns:
        The exit code: 1 if the run, or a job of a sweep, has failed.
    """
    with_traceback = os.environ.get(FULL_ERROR) == "1"
    has_begun = False

    def job(cfg: DictConfig) -> float | None:
        nonlocal with_traceback, has_begun
        has_begun = True
        with_traceback = with_traceback or bool(HydraConfig.get().runtime.choices.get("debug"))
        return run_task(cfg, with_traceback=with_traceback, command=command)

    job.__module__ = name  # Hydra's name for the job
    os.environ[FULL_ERROR] = "1"  # lets Hydra raise errors instead of printing them
    arguments = sys.argv[1:]
    command = [*_program(name), *arguments]
    try:
        refuse_flags(arguments)
        sys.argv[1:] = prepared(arguments)
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
        finally:
            sweep.summarize()
    except Exception as error:
        line = None if has_begun else correction(arguments)
        line = line or line_of(error)
        if line is None and not has_begun:
            line = " ".join(str(error).split())
        if line is None or with_traceback:
            raise
        sys.stderr.write(f"error: {line}\n")
        return 1
    return 1 if sweep.failures else 0


def _program(name: str) -> list[str]:
    """Words of the shell before the arguments.

    For example `qat train`, `.venv/bin/python train.py` or `python -m train`.
    """
    script, *arguments = sys.argv
    if Path(script).name == "qat":
        is_on_path = shutil.which("qat") == script
        return ["qat" if is_on_path else script, name]
    words = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    is_of_python = [*words, *arguments] == sys.orig_argv
    return words if is_of_python else typed(name).split()


def prepared(arguments: Sequence[str]) -> list[str]:
    """Arguments as Hydra needs them.

    `~` is expanded, paths are quoted where Hydra's grammar needs it, and `model=NAME`
    becomes the settings that it is short for.
    """
    is_multirun = "-m" in arguments or "--multirun" in arguments
    hydra_arguments = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        name = key.lstrip("+")
        if OPEN.fullmatch(name):
            key = f"++{name}"
        if value == "~" or value.startswith("~/"):
            value = os.path.expanduser("~") + value[1:]
        if name in PATHS or name.rpartition(".")[2] in PATHS_OF_GROUPS:
            value = _quoted_path(value, is_multirun=is_multirun)
        if name == "model":
            hydra_arguments += _named_model(value)
        else:
            hydra_arguments.append(f"{key}{equals}{value}")
    return hydra_arguments


def _quoted_path(value: str, *, is_multirun: bool) -> str:
    """A path, quoted where Hydra's grammar would refuse it or read it as a number."""
    is_sweep = is_multirun and SWEEP.search(value)
    needs_quotes = not PLAIN.fullmatch(value) and not GRAMMAR.match(value) and not is_sweep
    if needs_quotes:
        value = _quoted(value)
    if SWEEP_OF_NUMBERS.search(value):
        return value
    return ELEMENT.sub(lambda match: match[1] or f"'{match[0]}'", value)


def _quoted(value: str) -> str:
    """A value in single quotes, with backslashes doubled before a quote and at the end."""

    def escape(match: re.Match[str]) -> str:
        backslashes, quote = match.groups()
        return backslashes * 2 + ("\\'" if quote else "")

    escaped = re.sub(r"(\\*)('|$)", escape, value)
    return f"'{escaped}'"


def _named_model(name: str) -> list[str]:
    """Hydra's arguments for `model=NAME`: a choice, a repository of the hub, or a timm model."""
    if name.startswith("hf-hub:"):
        return ["model=_hub", f"model.name={name}"]
    if name in options("model") or not PLAIN.fullmatch(name):
        return [f"model={name}"]
    import timm

    timm_name = name.removeprefix("timm/")
    if timm.is_model(timm_name):
        return ["model=_timm", f"model.name={timm_name}"]
    return [f"model={name}"]


def run_task(
    cfg: DictConfig, *, with_traceback: bool = False, command: Sequence[str] = ()
) -> float | None:
    """Run one job in its run directory; print a known mistake as one line.

    A single run that fails exits with 1. A job of a sweep that fails writes its error to
    `results.json` and returns NaN, so that the other jobs run.

    Args:
        cfg: the composed config.
        with_traceback: raise errors instead of printing them.
        command: the words that were typed.

    Returns:
        The result of the task: the number that a sweep optimises.
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
    try:
        task = _start(cfg, in_sweep=in_sweep, with_traceback=with_traceback)
        with run_dir.locked(cfg.run_dir), signals.listening():
            return sweep.reported(task(cfg))
    except Preempted as stop:
        sys.exit(_leave(cfg, stop, state, command))
    except Exception as error:
        line = line_of(error)
        if with_traceback or (line is None and not in_sweep):
            raise
        _report_failure(cfg, error, line, state)
    if not in_sweep:
        sys.exit(1)
    return sweep.reported(math.nan)


def _leave(
    cfg: DictConfig, stop: Preempted, state: run_dir.RunDirState, command: Sequence[str]
) -> int:
    """The exit code of a run that a signal has stopped, after telling the user how to resume it."""
    folder = Path(cfg.run_dir)
    if not stop.wants_requeue and state.has_begun() and not run_dir.checkpoints(folder):
        # A run with an error may be started again by the same command.
        _write_error(cfg, f"stopped by {stop.name}", state)
    hint = "the same command repeats it"
    # A run that has not begun may have files of another one in its directory.
    if "resume" in cfg and (state.has_begun() or cfg.resume or cfg.sweep_dir):
        hint = _resume_hint(command, cfg.sweep_dir or cfg.run_dir)
    return slurm.end_preempted(stop, folder, hint)


def _resume_hint(command: Sequence[str], folder: str) -> str:
    """How to resume a run: the command to paste, except where a launcher has typed it."""
    settings_to_add = ["resume=auto", f"run_dir={folder}"]
    if not command or slurm.is_launched():
        return f"the same command resumes with {' '.join(settings_to_add)}"
    words = [word for word in command if word.partition("=")[0].lstrip("+") not in RESUMING]
    return f"to resume: {shlex.join([*words, *settings_to_add])}"


def _report_failure(
    cfg: DictConfig, error: Exception, line: str | None, state: run_dir.RunDirState
) -> None:
    """Log an error, and write it to the run directory.

    Args:
        cfg: the composed config.
        error: what the task has raised.
        line: the result of `line_of`.
        state: of the run directory, before the task.
    """
    message = line or " ".join(f"{type(error).__name__}: {error}".split())
    sweep.failures.append(message)
    label = "error"
    if not ranks.is_first():
        # If the first process fails with the same error, the launcher ends this one meanwhile.
        time.sleep(OTHERS_WAIT_S)
        label = f"error in process {ranks.rank()}"
    log.error("%s: %s", label, message, exc_info=error if line is None else None)
    if not isinstance(error, run_dir.UsedError):
        _write_error(cfg, message, state)


def _start(
    cfg: DictConfig, *, in_sweep: bool, with_traceback: bool
) -> Callable[[DictConfig], float | None]:
    """The task of a command.

    If the run needs several processes, and no launcher has started them, this process becomes
    torchrun and does not return.

    Raises:
        UsageError: the run cannot have the processes that it asks for.
    """
    check_choice("command", cfg.command, tuple(settings.COMMANDS))
    trainer = cfg.get("trainer") or {}
    slurm.check_processes(trainer)
    # These commands refuse several devices themselves.
    has_one_process = cfg.command in {"analyze", "export"} or cfg.get("predict") is not None
    count = 0 if has_one_process else ranks.processes_to_start(trainer)
    if count:
        if in_sweep:
            raise UsageError(sweep.SEVERAL.format(trainer["devices"]))
        settings.check(cfg)
        run_dir.lock_for_ranks(cfg.run_dir)
        os.environ[FULL_ERROR] = str(int(with_traceback))
        ranks.become_torchrun(count, _command_line(cfg))
    if "resume" in cfg:
        cfg.resume = slurm.implied_resume(cfg.resume, Path(cfg.run_dir), overwrite=cfg.overwrite)
    if cfg.get("sweep") is not None:
        return sweep.gather_sweep
    task = "evaluate" if cfg.command == "eval" else cfg.command
    return getattr(importlib.import_module(f"qat.tasks.{task}"), task)


def _command_line(cfg: DictConfig) -> list[str]:
    """The command line of this run for other processes, with its run directory."""
    is_console_script = typed("").startswith("qat")
    command = [cfg.command] if is_console_script else []
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("run_dir=")]
    return [sys.argv[0], *command, *arguments, *prepared([f"run_dir={cfg.run_dir}"])]


def _write_error(cfg: DictConfig, message: str, state: run_dir.RunDirState) -> None:
    """Write results with an error, and the report if the run had begun."""
    if not ranks.is_first() or not state.takes_error():
        return
    from qat.tasks.results import write_results

    # The error may be about this folder or this config.
    with contextlib.suppress(OSError, OmegaConfBaseException):
        write_results(cfg, error=message)
        if state.has_begun():
            from qat.tasks.report import report_run

            report_run(cfg)


class TerminalHandler(logging.StreamHandler):
    """Writes to the present `sys.stdout`: a live progress bar replaces it to print above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def format(self, record: logging.LogRecord) -> str:
        """The line without control characters, which the name of a file or class may contain."""
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore errors: the reader may be gone (`| head`), and the log file has the line."""

    @property
    def stream(self) -> TextIO:
        """The present standard output."""
        return sys.stdout
