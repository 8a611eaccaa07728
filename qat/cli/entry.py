"""Between Hydra and a task: run directory, one-line errors, exit codes. Imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib
import logging
import math
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qat.cli import arguments, foreign, job, repeat, resolvers, sweep
from qat.cli.console import TerminalHandler
from qat.errors import UsageError
from qat.launch import lock, ranks, signals, slurm
from qat.launch.lock import InUseError
from qat.launch.outputs import Found, UsedError, checkpoints
from qat.launch.signals import Preempted
from qat.launch.watch import LOST

log = logging.getLogger(__name__)
logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it announces its font cache on a fresh machine
OTHERS_WAIT_S = 3
# What gloo and NCCL say of it; torch has no common class for them.
_LOST = re.compile(r"[Cc]onnection (closed|reset) by peer|remote process exited|Broken pipe|failed to recv")
# What torch says of a process of a loader that is gone, of parameters for which no gradient came, and of open files.
_WORKER = re.compile(r"DataLoader worker \(pid.*")
_UNUSED = re.compile(r"parameters that were not used in producing")
_FILES = re.compile(r"[Tt]oo many open files|received 0 items of ancdata")
_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class LostError(UsageError):
    """Another process of the run has ended, and with it the connection to it."""


def _run_name() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"slurm-{job}" if job else ranks.agreed("run_name", f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")


def writable(run_dir: str) -> str:
    """`run_dir` itself. Where it cannot be made the process ends here, with one line: Hydra would end it with a traceback."""
    if not isinstance(run_dir, str) or not run_dir or "\0" in run_dir:
        sys.exit(f"error: run_dir={run_dir!r}: must be a path")
    path = Path(run_dir).expanduser()
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError("it is a file")
        above = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
        with tempfile.TemporaryDirectory(dir=above, prefix=".qat"):
            return str(path)
    except OSError as error:
        sys.exit(f"error: run_dir={run_dir!r}: cannot be written ({error.strerror or error}); must be a folder that is or can be made")


OmegaConf.register_new_resolver("run_name", _run_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("writable", writable, replace=True)
resolvers.register()
repeat.register()


def command(main: Callable[[], None]) -> int:
    """Do what a script is there for, and say at its end what came of a sweep, however that ended.

    Args:
        main: the function that Hydra has wrapped.

    Returns:
        Exit code: 1 if a job failed, here or in another process; 130 behind a Ctrl-C.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is signals.end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = arguments.prepared(sys.argv[1:])
    try:
        arguments.check(sys.argv[1:])
        foreign.check_repeated(sys.argv[1:])
        sys.argv[1:] = arguments.expanded(sys.argv[1:])
    except UsageError as error:
        sys.exit(f"error: {error}")
    try:
        main()
    except KeyboardInterrupt:
        _say(f"stopped by Ctrl-C{sweep.way_on()}")
        return 128 + signal.SIGINT
    finally:
        sweep.summarize()
        signal.signal(signal.SIGINT, handler)  # Python takes a moment to end, too
    return 1 if sweep.failures else 0


def _say(line: str) -> None:
    """Log a line as it is, also while Hydra's own format is in force: before a job, and between jobs."""
    if any(isinstance(handler, TerminalHandler) for handler in logging.getLogger().handlers):
        log.warning(line)
    else:
        sys.stderr.write(f"{line}\n")


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
    # A process that was started for a job is not the one that goes on with the next job.
    ends = not multirun or ranks.is_started_here()
    with contextlib.ExitStack() as stack:
        found = Found(Path(cfg.run_dir))
        try:
            stack.enter_context(lock.held(cfg.run_dir))
            return sweep.reported(_call(task, cfg, found))
        except ranks.RankError as error:
            if error.message is not None:
                _report(cfg, error.message, None, found)
            sweep.failures.append(str(error))
            code, ends = error.code, ends or error.code - 128 in signals.SIGNALS  # which end a multirun, too
        except Exception as error:
            mistake = _mistake(error)
            if isinstance(mistake, LostError) and ranks.is_started_here():
                sys.exit(LOST)
            if _wants_traceback(cfg) or (mistake is None and not multirun):
                raise
            if mistake is not None:
                sys.unraisablehook = lambda _: None  # what half-built objects raise at their end says less than the line
            message = str(mistake) if mistake is not None else f"{type(error).__name__}: {error}"
            _report(cfg, message, error if mistake is None else None, None if isinstance(mistake, InUseError | UsedError) else found)
            code = 1
    if ends:
        sys.exit(code)
    return sweep.reported(math.nan)


def _call(task: str, cfg: DictConfig, found: Found) -> float | None:
    """Run the task; a signal to go ends the process, also in the middle of a multirun."""
    with signals.listening():
        try:
            return _start(task, cfg)
        except Preempted as stop:
            if not stop.wants_requeue and found.has_begun() and not checkpoints(Path(cfg.run_dir)):
                _write_error(cfg, f"stopped by {stop.name}", found)  # so that the same command may be given again
            sys.exit(slurm.leave(stop, Path(cfg.run_dir), _way_on(cfg)))


def _start(task: str, cfg: DictConfig) -> float | None:
    """Run the task here, or in the processes that it needs."""
    _expand_homes(cfg)
    least = 0
    if HydraConfig.initialized():
        repeat.follow(cfg, list(HydraConfig.get().overrides.task))
        least = sweep.begin_job()
    if "resume" in cfg:
        cfg.resume = slurm.implied_resume(cfg.resume, Path(cfg.run_dir), overwrite=bool(cfg.get("overwrite")))
    trainer = cfg.get("trainer")
    slurm.check_place(trainer if OmegaConf.is_dict(trainer) else {})
    alone = task in {"analyze", "export"} or cfg.get("predict") is not None  # they refuse several devices themselves
    with signals.importing():
        count = max(0 if alone else ranks.to_start(trainer), least)
        function = None if count else getattr(importlib.import_module(f"qat.tasks.{task}"), task)
    if function is None:
        nodes = int(trainer.get("num_nodes", 1)) if trainer else 1
        return ranks.supervise(f"{__name__}:{run_serialized.__name__}", job.serialize_job(task, cfg), Path(cfg.run_dir), count, nodes)
    if not ranks.is_first():
        logging.getLogger().setLevel(logging.ERROR)
    result: float | None = function(cfg)
    return result


def run_serialized(text: str) -> None:
    """Run a job in a process that was started for it, and hand back what came of it.

    Args:
        text: the job, of `serialize_job`.
    """
    task, cfg = job.deserialize_job(text)
    if ranks.is_first() and HydraConfig.initialized():
        hydra_cfg: Any = HydraConfig.get()
        configure_log(hydra_cfg.job_logging, hydra_cfg.verbose)
    else:
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
    value = None
    try:
        value = run(task, cfg)
    finally:
        ranks.hand_back(value, next(iter(sweep.failures), None))


def _way_on(cfg: DictConfig) -> str:
    """How a person goes on with a run that a signal has stopped."""
    if "resume" not in cfg:
        return "the same command does it again"
    line = None if slurm.job() is not None or ranks.is_started_elsewhere() else repeat.going_on(cfg)
    return f"go on with: {line}" if line else f"the same command goes on with resume=auto run_dir={cfg.get('sweep_dir') or cfg.run_dir}"


def _enter_run_dir(cfg: DictConfig) -> None:
    """Below here `cfg.run_dir` is the job's own directory, also in a sweep."""
    if HydraConfig.initialized():
        with open_dict(cfg):
            cfg.run_dir = HydraConfig.get().runtime.output_dir
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                cfg.sweep_dir = str(Path(cfg.run_dir).parent)  # for what its jobs share
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)


def _expand_homes(cfg: DictConfig) -> None:
    """Replace the tilde of paths that a yaml file or quotes brought in; `arguments.prepared` did so for others."""
    for name in arguments.PATHS:
        value = OmegaConf.select(cfg, name)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(cfg, name, str(Path(value).expanduser()))


def _mistake(error: BaseException | None) -> UsageError | None:
    """The `UsageError` behind an exception: Hydra wraps what a constructor raises; the config and the disk have exceptions of their own."""
    while error is not None:
        if isinstance(error, UsageError):
            return error
        if isinstance(error, OmegaConfBaseException):
            return UsageError(f"config: {in_one_line(error)}")
        if (mistake := _of_the_machine(error)) is not None:
            return mistake
        error = error.__cause__
    return None


def _of_the_machine(error: BaseException) -> UsageError | None:
    """A disk, a limit or another process that is in the way."""
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        return UsageError(f"cannot be written: {error.filename} ({error.strerror})")
    if isinstance(error, OSError | RuntimeError) and _FILES.search(str(error)):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return UsageError(f"ulimit -n {limit}: too few open files for this run; must be more, or data.num_workers fewer")
    if isinstance(error, PermissionError):
        return UsageError(f"no access to {error.filename} ({error.strerror})")
    if isinstance(error, RuntimeError) and (worker := _WORKER.search(str(error))):
        advice = "memory may be short: data.num_workers fewer, data.batch_size smaller, on Docker --shm-size larger"
        return UsageError(f"{worker[0].rstrip('. ')}; {advice}")
    if isinstance(error, RuntimeError) and _UNUSED.search(str(error)):
        return UsageError("trainer.strategy: a step leaves some parameters out; must be ddp_find_unused_parameters_true")
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):
        return LostError(f"another process of this run is gone: {str(error).partition(chr(10))[0]}")
    return None


def in_one_line(error: OmegaConfBaseException) -> str:
    """The first line of what OmegaConf says, and the whole name of the setting where the line has its last part alone."""
    line, name = str(error).partition("\n")[0], str(error.full_key or "")
    return f"{line} ({name})" if name not in line else line


def _wants_traceback(cfg: DictConfig) -> bool:
    debug = HydraConfig.initialized() and HydraConfig.get().runtime.choices.get("debug")
    return bool(debug) or os.environ.get("HYDRA_FULL_ERROR") == "1"


def _report(cfg: DictConfig, message: str, unexpected: BaseException | None, found: Found | None) -> None:
    """Say what went wrong, and write it into the run directory as it was `found`; None = that belongs to another run."""
    sweep.failures.append(message)
    line = " ".join(message.split())
    if not ranks.is_first():
        if not ranks.is_started_here():
            time.sleep(OTHERS_WAIT_S)  # the first process says it if it is its mistake too, and most launchers then end the others
        log.error("error in process %d: %s", ranks.rank(), line, exc_info=unexpected)
        return
    log.error("error: %s", line, exc_info=unexpected)
    if found is not None:
        _write_error(cfg, message, found)


def _write_error(cfg: DictConfig, message: str, found: Found) -> None:
    """Results with an error, and the report of a run that had begun."""
    from qat.cli.results import write_results

    if not (ranks.is_first() and ranks.is_on_first_node() and found.takes_error()):
        return
    with contextlib.suppress(OSError, OmegaConfBaseException):  # the error may be about this folder, this config
        write_results(cfg, error=message)
        if found.has_begun():
            importlib.import_module("qat.tasks.report").report_run(cfg)
