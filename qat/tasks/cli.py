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
import sys
import tempfile
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qat.errors import UsageError
from qat.tasks import repeat, resolvers

log = logging.getLogger(__name__)
_failed_jobs: list[str] = []
logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it announces its font cache on a fresh machine
PATHS = ("ckpt", "teacher.ckpt", "model.weights", "data.root", "predict", "run")
_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def _run_name() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"slurm-{job}" if job else f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"


def writable(run_dir: str) -> str:
    """`run_dir` itself. Where it cannot be made the process ends here, with one line: Hydra would end it with a traceback."""
    path = Path(run_dir).expanduser()
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError("it is a file")
        above = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
        with tempfile.TemporaryDirectory(dir=above, prefix=".qat"):
            return str(path)
    except OSError as error:
        sys.exit(f"error: run_dir={run_dir!r}: cannot be written ({error.strerror or error}); allowed is a folder that is or can be made")


OmegaConf.register_new_resolver("run_name", _run_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("writable", writable, replace=True)
resolvers.register()
repeat.register()


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
    _expand_homes(cfg)
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        if HydraConfig.initialized():
            repeat.follow(cfg, list(HydraConfig.get().overrides.task))
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


def expand_home() -> None:
    """Replace the tilde of arguments like `data.root=~/x`, which a shell leaves alone and Hydra's grammar does not know."""
    sys.argv[1:] = [re.sub(r"(?<==)~(?=/|$)", str(Path.home()), argument, count=1) for argument in sys.argv[1:]]


def _expand_homes(cfg: DictConfig) -> None:
    """The same for paths that a yaml file or quotes brought in."""
    for name in PATHS:
        value = OmegaConf.select(cfg, name)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(cfg, name, str(Path(value).expanduser()))


def _mistake(error: BaseException | None) -> UsageError | None:
    """The `UsageError` behind an exception: Hydra wraps what a constructor raises; the config and the disk have exceptions of their own."""
    while error is not None:
        if isinstance(error, UsageError):
            return error
        if isinstance(error, OmegaConfBaseException):
            return UsageError(f"config: {str(error).partition(chr(10))[0]}")
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            return UsageError(f"cannot be written: {error.filename} ({error.strerror})")
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
    if (Path(cfg.run_dir) / "results.json").exists():
        return
    with contextlib.suppress(OSError):  # the line above is what matters, and may be about this very folder
        write_results(cfg, error=message)
        if (Path(cfg.run_dir) / "config.yaml").exists():  # its settings were checked, so it had begun
            importlib.import_module("qat.tasks.report").report_run(cfg)
