"""The commands, `qat train ...` or in a clone `python train.py ...`: from the command line to a task, and from an error to a line.

Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

from qat.launch import startup  # noqa: F401  (first: Ctrl-C)

# isort: split
import contextlib
import errno
import importlib
import importlib.metadata
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

import qat
from qat.cli import sweep
from qat.cli.corrections import correction, refuse_flags
from qat.errors import UsageError
from qat.launch import ranks, run_dir, signals
from qat.launch.signals import Preempted
from qat.tasks import settings
from qat.tasks.conf import CONF, options, typed, yaml_lines
from qat.utils.text import printable
from qat.utils.validate import check_choice, unknown

log = logging.getLogger(__name__)
logging.getLogger("matplotlib").setLevel(
    logging.WARNING
)  # it announces its font cache on a fresh machine

COMMANDS = {
    "train": "train, quantization-aware or in float",
    "eval": "accuracy of a checkpoint, or its predictions",
    "ptq": "quantize a float model without training",
    "analyze": "analyse a checkpoint",
    "export": "a file to deploy",
    "version": "versions of what is installed",
}
# Settings whose values are paths, which are typed as the shell knows them; the second by the last part of their names.
PATHS = {"predict", "run", "sweep", "file", "run_dir"}
PATHS_OF_GROUPS = {"ckpt", "weights", "root", "dir", "dirpath", "save_dir"}
# A quoted text, or a whole element that Hydra would read as a number or a truth value.
QUOTED = r"((['\"])(?:\\.|(?!\2).)*\2)"
NUMBER_LIKE = r"(?<![^\[(,\s])(?:[+-]?(?:[.\d][\w.+-]*|inf|nan)|true|false)(?![^\]),\s])"
ELEMENT = re.compile(f"{QUOTED}|{NUMBER_LIKE}", re.IGNORECASE)
# What needs no quotes in Hydra's grammar, and what is grammar itself.
PLAIN, GRAMMAR = re.compile(r"[A-Za-z0-9_./:+%@-]*"), re.compile(r"['\"\[]|.*\$\{")
SWEEP = re.compile(r",|\b(choice|range|interval|glob|tag|sort|shuffle)\(")
OF_NUMBERS = re.compile(r"\b(range|interval)\(")
ANY_MODEL = "; any model of timm: model=NAME, or model=hf-hub:timm/NAME"
FULL_ERROR = "HYDRA_FULL_ERROR"
# Groups that take keys that they do not have yet.
OPEN = re.compile(r"(quant|ptq)\.overrides|model\.args\..*")
OTHERS_WAIT_S = 10
_FILES = re.compile(r"[Tt]oo many open files|received 0 items of ancdata")
_LOST = re.compile(
    r"[Cc]onnection (closed|reset) by peer|remote process exited|Broken pipe|failed to recv"
)


def main() -> int:
    """The console script `qat`.

    Returns:
        The exit code.
    """
    sys.path.append(os.getcwd())  # modules beside the run, as `python -m` finds them
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in settings.COMMANDS:
        del sys.argv[1]
        return run(name)
    if name in {"--help", "-h"}:
        lines = [f"  qat {one:<9}{what}" for one, what in COMMANDS.items()]
        tail = "qat COMMAND --help lists groups and settings."
        sys.stdout.write(
            "\n".join(["qat COMMAND [group=choice ...] [key=value ...]", *lines, tail, ""])
        )
    elif name in {"version", "--version"}:
        found = [
            f"vit-qat {qat.__version__}",
            *(f"{one} {importlib.metadata.version(one)}" for one in ("torch", "timm", "lightning")),
        ]
        sys.stdout.write(", ".join(found) + "\n")
    else:
        sys.stderr.write(f"error: qat {name}: must be one of {', '.join(COMMANDS)}\n")
        return 1
    return 0


def run(name: str) -> int:
    """Do what the command line says.

    Args:
        name: of the command, a key of `settings.COMMANDS`.

    Returns:
        The exit code: 1 if a run, or a job of a sweep, has failed.
    """
    with_traceback, has_begun = os.environ.get(FULL_ERROR) == "1", False

    def job(cfg: DictConfig) -> float | None:
        nonlocal with_traceback, has_begun
        with_traceback, has_begun = (
            with_traceback or bool(HydraConfig.get().runtime.choices.get("debug")),
            True,
        )
        return run_task(cfg, with_traceback=with_traceback)

    job.__module__ = name  # Hydra calls the job so
    os.environ[FULL_ERROR] = "1"  # Hydra raises what it would write at length
    arguments = sys.argv[1:]
    try:
        refuse_flags(arguments)
        sys.argv[1:] = prepared(arguments)
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
        finally:
            sweep.summarize()
    except Exception as error:
        line = (None if has_begun else correction(arguments)) or line_of(error)
        if line is None and not has_begun:
            line = " ".join(str(error).split())
        if line is None or with_traceback:
            raise
        sys.stderr.write(f"error: {line}\n")
        return 1
    return 1 if sweep.failures else 0


def prepared(arguments: Sequence[str]) -> list[str]:
    """The arguments for Hydra: `~` expanded, paths quoted where its grammar would not take them, a model by its name written out."""
    done = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        name = key.lstrip("+")
        key = f"++{name}" if OPEN.fullmatch(name) else key
        value = re.sub(r"^~(?=/|$)", lambda _: os.path.expanduser("~"), value)
        is_sweep = SWEEP.search(value) and {"-m", "--multirun"} & set(arguments)
        is_path = name in PATHS or name.rpartition(".")[2] in PATHS_OF_GROUPS
        if is_path and not (PLAIN.fullmatch(value) or GRAMMAR.match(value) or is_sweep):
            inner = re.sub(
                r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value
            )
            value = f"'{inner}'"
        if is_path and not OF_NUMBERS.search(value):
            value = ELEMENT.sub(lambda found: found[1] or f"'{found[0]}'", value)
        done += _named_model(value) if name == "model" else [f"{key}{equals}{value}"]
    return done


def _named_model(name: str) -> list[str]:
    """`model=NAME` in Hydra's words: one of ours, of a repository on the hub, or any of timm's."""
    if name.startswith("hf-hub:"):
        return ["model=_hub", f"model.name={name}"]
    if name in options("model") or not PLAIN.fullmatch(name):
        return [f"model={name}"]
    import timm

    timms = name.removeprefix("timm/")
    return ["model=_timm", f"model.name={timms}"] if timm.is_model(timms) else [f"model={name}"]


def run_task(cfg: DictConfig, *, with_traceback: bool = False) -> float | None:
    """Do one job: in its run directory, which it alone writes into; a known mistake is one line.

    A single run then exits with 1; in a sweep the job writes its error to `results.json` and returns NaN, and the other jobs go on.

    Args:
        cfg: the composed config.
        with_traceback: let errors through.

    Returns:
        What the task returns: the number a sweep optimises.
    """
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if HydraConfig.initialized():
        cfg.run_dir = HydraConfig.get().runtime.output_dir
        cfg.sweep_dir = (
            str(Path(cfg.run_dir).parent) if in_sweep else None
        )  # for what its jobs share
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found = run_dir.RunDirState(folder)
    if not ranks.is_first():
        logging.getLogger().setLevel(logging.ERROR)
    try:
        task = _start(cfg, in_sweep=in_sweep, with_traceback=with_traceback)
        with run_dir.locked(cfg.run_dir), signals.listening():
            return sweep.reported(task(cfg))
    except Preempted as stop:
        if not stop.wants_requeue and found.has_begun() and not run_dir.checkpoints(folder):
            _write_error(
                cfg, f"stopped by {stop.name}", found
            )  # so that the same command may be given again
        where = cfg.sweep_dir or cfg.run_dir
        hint = (
            f"the same command resumes with resume=auto run_dir={where}"
            if "resume" in cfg
            else "the same command repeats it"
        )
        sys.exit(ranks.leave(stop, folder, hint))
    except Exception as error:
        line = line_of(error)
        if with_traceback or (line is None and not in_sweep):
            raise
        message = line or " ".join(f"{type(error).__name__}: {error}".split())
        sweep.failures.append(message)
        if not ranks.is_first():
            time.sleep(
                OTHERS_WAIT_S
            )  # the first process has the same line if it is its mistake too, and the launcher then ends this one
        who = "error" if ranks.is_first() else f"error in process {ranks.rank()}"
        log.error("%s: %s", who, message, exc_info=error if line is None else None)
        if not isinstance(error, run_dir.UsedError):
            _write_error(cfg, message, found)
    if not in_sweep:
        sys.exit(1)
    return sweep.reported(math.nan)


def _start(
    cfg: DictConfig, *, in_sweep: bool, with_traceback: bool
) -> Callable[[DictConfig], float | None]:
    """The task of a run in this process; where it needs several processes that nobody has started, this one becomes torchrun.

    Raises:
        UsageError: the run cannot have the processes that it asks for.
    """
    check_choice("command", cfg.command, tuple(settings.COMMANDS))
    trainer = cfg.get("trainer") or {}
    ranks.check_place(trainer)
    is_alone = (
        cfg.command in {"analyze", "export"} or cfg.get("predict") is not None
    )  # they refuse several devices themselves
    if count := 0 if is_alone else ranks.to_start(trainer):
        if in_sweep:
            raise UsageError(sweep.SEVERAL.format(trainer["devices"]))
        settings.check(cfg)
        run_dir.lock_for_ranks(cfg.run_dir)
        os.environ[FULL_ERROR] = str(int(with_traceback))
        given = [one for one in sys.argv[1:] if not one.startswith("run_dir=")]
        name = [cfg.command] if typed("").startswith("qat") else []
        ranks.become_torchrun(
            count, [sys.argv[0], *name, *given, *prepared([f"run_dir={cfg.run_dir}"])]
        )
    if "resume" in cfg:
        cfg.resume = ranks.implied_resume(cfg.resume, Path(cfg.run_dir), overwrite=cfg.overwrite)
    if cfg.get("sweep") is not None:
        return sweep.gather_sweep
    task = "evaluate" if cfg.command == "eval" else cfg.command
    return getattr(importlib.import_module(f"qat.tasks.{task}"), task)


def line_of(error: BaseException | None) -> str | None:
    """What to print of a known mistake, in one line; None for any other error.

    Hydra wraps what a constructor raises, so that the mistake may be the cause of an error.
    """
    while error is not None:
        text = " ".join(str(error).split())
        if isinstance(error, UsageError):
            return text
        if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
            group, _, name = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
            return _unknown(f"{group}={name}", name, options(group)) + (
                ANY_MODEL if group == "model" else ""
            )
        if (
            isinstance(error, ConfigKeyError | ConfigAttributeError)
            and error.parent_node is not None
        ):
            known = map(str, error.parent_node) if OmegaConf.is_dict(error.parent_node) else ()
            names = [
                one
                for _, one, _ in yaml_lines(OmegaConf.to_yaml(error.parent_node._get_root()))
                if not one.startswith(("hydra", "callbacks", "default_"))
            ]
            return _unknown(str(error.full_key or error.key), str(error.key), known, names)
        if isinstance(error, OmegaConfBaseException):
            line, name = (
                str(error)
                .partition("\n")[0]
                .rpartition(" raised while resolving interpolation: ")[2],
                str(error.full_key or ""),
            )
            return f"{name}: {line}" if name not in line else line
        if isinstance(error, OSError | RuntimeError) and _FILES.search(text):
            return "too many open files; data.num_workers must be fewer, or the limit higher (ulimit -n)"
        if isinstance(error, OSError) and (
            error.filename or error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        ):
            return f"{error.filename or 'a file'}: cannot be read or written ({error.strerror})"
        if isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid"):
            return f"{text}; memory may be short: data.num_workers fewer, data.batch_size smaller, on Docker --shm-size larger"
        if isinstance(error, RuntimeError) and _LOST.search(text):
            return f"another process of this run is gone: {text}"
        if isinstance(error, RuntimeError) and text.startswith("Early stopping conditioned on"):
            return text
        if error.__cause__ is None and type(error).__module__.partition(".")[0] in {
            "hydra",
            "lightning",
        }:
            return text
        error = error.__cause__
    return None


def _unknown(setting: str, name: str, known: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """A setting that there is not: what to use where it was removed, else names that are near."""
    now = settings.removed(setting)
    return (
        f"{setting}: was removed; use: {now}" if now else unknown(setting, name, known, elsewhere)
    )


def _write_error(cfg: DictConfig, message: str, found: run_dir.RunDirState) -> None:
    """Results with an error, and the report of a run that had begun."""
    if not (ranks.is_first() and found.takes_error()):
        return
    from qat.tasks.results import write_results

    with contextlib.suppress(
        OSError, OmegaConfBaseException
    ):  # the error may be about this folder, this config
        write_results(cfg, error=message)
        if found.has_begun():
            from qat.tasks.report import report_run

            report_run(cfg)


class TerminalHandler(logging.StreamHandler):
    """Writes to what `sys.stdout` is when a line comes: a live progress bar puts itself there and prints lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def format(self, record: logging.LogRecord) -> str:
        """The line, in which a name of a file or a class can neither move the cursor nor stop the output."""
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: a reader may be gone (`| head`), and the log file has the line."""

    @property
    def stream(self) -> TextIO:
        """The present standard output."""
        return sys.stdout
