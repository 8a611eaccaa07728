"""Lightning's experiment loggers with names and folders from the run directory, kept from calling home."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from qat.errors import UsageError
from qat.launch.signals import Preempted
from qat.utils.validate import check_text

# They report to their makers by default, and MLflow that it makes tables; who wants that sets the variable.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "MLFLOW_LOGGING_LEVEL": "WARNING"}


def tensorboard(run_dir: str, **options: Any) -> TensorBoardLogger:
    """Event files in the run directory.

    Args:
        run_dir: the run directory; TensorBoard calls the run after it.
        options: for `TensorBoardLogger`.

    Raises:
        UsageError: TensorBoard is not installed, or a setting cannot work.
    """
    check_text("logger.tensorboard.run_dir", run_dir)
    _require("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    _check_options("logger.tensorboard", options, TensorBoardLogger, SummaryWriter)
    return TensorBoardLogger(run_dir, **{"name": "", "version": "", "default_hp_metric": False, **options})


def wandb(run_dir: str, *, offline: bool = True, **options: Any) -> WandbLogger:
    """A run of Weights & Biases in `wandb/` of the run directory, in the group of the directory above.

    Args:
        run_dir: the run directory; the run is called after it.
        offline: write files only.
        options: for `WandbLogger` and `wandb.init`.

    Raises:
        UsageError: W&B is not installed, or a setting cannot work.
    """
    check_text("logger.wandb.run_dir", run_dir)
    if not isinstance(offline, bool):
        raise UsageError(f"logger.wandb.offline={offline!r}: must be true or false")
    for name in {"project", "name", "group"} & options.keys():
        check_text(f"logger.wandb.{name}", options[name])
    _check_options("logger.wandb", options, WandbLogger, _require("wandb").init)
    run = Path(run_dir).absolute()
    # The jobs of a multirun share a process, not a run; train.log has the terminal's lines.
    settings = {"reinit": "create_new", "console": "off", "silent": offline, **options.pop("settings", {})}
    return WandbLogger(offline=offline, settings=settings, **{"save_dir": run, "name": run.name, "group": run.parent.name, **options})


def mlflow(run_dir: str, *, store: str | None = None, tracking_uri: str | None = None, **options: Any) -> MLFlowLogger:
    """A run of MLflow in a SQLite file, in the experiment of the directory above the run's.

    Args:
        run_dir: the run directory; the run is called after it.
        store: directory of the file and of artifacts; None = the run directory.
        tracking_uri: another store, or a server.
        options: for `MLFlowLogger`.

    Raises:
        UsageError: MLflow is not installed, or a setting cannot work.
    """
    for name, value in {"run_dir": run_dir, "store": run_dir if store is None else store, "tracking_uri": tracking_uri}.items():
        if name != "tracking_uri" or value is not None:
            check_text(f"logger.mlflow.{name}", value)
    _require("mlflow")
    run, folder = Path(run_dir).absolute(), Path(store or run_dir).absolute()
    local = {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_location": str(folder / "artifacts")}
    where = {"tracking_uri": tracking_uri} if tracking_uri else local
    settings = {**where, "run_name": run.name, "experiment_name": run.parent.name, **options}
    folder.mkdir(parents=True, exist_ok=True)
    # Jobs that begin at the same time, and ranks, would each make the tables and the experiment.
    with FileLock(folder / "mlflow.lock"):
        logger = MLFlowLogger(**settings)
        _make_experiment(settings["tracking_uri"], settings["experiment_name"], settings.get("artifact_location"))
    return logger


def _make_experiment(tracking_uri: str, name: str, artifact_location: str | None) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri)
    if client.get_experiment_by_name(name) is None:
        client.create_experiment(name, artifact_location=artifact_location)


@contextlib.contextmanager
def closing(loggers: Iterable[Logger]) -> Generator[None]:
    """End the runs that Lightning leaves open until the process ends, in a multirun long after the job; however the block ends."""
    code = 1
    try:
        yield
        code = 0
    except Preempted:
        code = 0
        raise
    finally:
        close(loggers, code)


def close(loggers: Iterable[Logger], exit_code: int) -> None:
    """End the runs of loggers; any code but 0 says that they failed."""
    for logger in loggers:
        # Asking for `experiment` would begin a run where nothing was logged yet.
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger._experiment.finish(exit_code=exit_code)


def _check_options(setting: str, options: Mapping[str, Any], *takers: Callable[..., Any]) -> None:
    """Raise `UsageError` for an option that none of these takes: the packages say so only at the first step."""
    known = {name for taker in takers for name in inspect.signature(taker).parameters}
    for name in options:
        if name not in known:
            raise UsageError(f"{setting}.{name}: must be one of {', '.join(sorted(known))}")


def _require(package: str) -> Any:
    """Import a package; Lightning would do so only at the first step.

    Raises:
        UsageError: it is missing, or does not import.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    # MLflow and its migrations tell every table.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"logger={package!r}: cannot import {package} ({error}); it comes with: pip install 'vit-qat[loggers]'") from error
