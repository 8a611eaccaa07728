"""Write `metrics.csv` of a run that may be killed and resumed; configure other loggers."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
from collections.abc import Generator, Iterable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from qat.errors import UsageError
from qat.launch.signals import Preempted
from qat.utils.files import csv_rows, write_text

# By default, W&B and MLflow send usage data to their makers, and MLflow logs the tables that it
# creates.
_TELEMETRY_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def disable_telemetry() -> None:
    """Set environment variables of W&B and MLflow, if unset; both read them when imported."""
    for name, value in _TELEMETRY_DEFAULTS.items():
        os.environ.setdefault(name, value)


class CSVLog(CSVLogger):
    """Lightning's logger, but every row is written immediately; a resumed run continues the file.

    Attributes:
        resume_step: optimizer steps of the checkpoint from which the run is resumed. Rows from this
            step on are dropped, because the run writes them again. 0 = a new run, which replaces
            the file.
    """

    resume_step: int = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self.resume_step)
        return self._experiment  # type: ignore[return-value]


class _Writer(ExperimentWriter):
    """Writes `metrics.csv`."""

    def __init__(self, log_dir: str, resume_step: int) -> None:
        """Keep the rows before `resume_step`, or delete the file if there are none."""
        super().__init__(log_dir)
        self._last_row = ""
        path = Path(self.metrics_file_path)
        rows: list[dict[str, str]] = []
        try:
            if resume_step and path.is_file():
                rows = _rows_before(path, resume_step)
            self.metrics_keys = sorted(set().union(*rows))
        except Exception as error:
            raise UsageError(
                f"{path}: must be the table that this run wrote; "
                f"if you delete it, the run resumes without its earlier rows ({error})"
            ) from error
        if rows:
            self._write(rows)
        else:
            path.unlink(missing_ok=True)

    def _check_log_dir_exists(self) -> None:
        """Keep the rows of a resumed run, which Lightning would delete."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Write a row, unless it repeats the last row (as after `log_before_saving`)."""
        row = f"{step} {metrics_dict}"
        if row != self._last_row:
            super().log_metrics(metrics_dict, step)
            self.save()
        self._last_row = row

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:  # noqa: ARG002  (Lightning's signature)
        self._write(csv_rows(Path(self.metrics_file_path)))

    def _write(self, rows: list[dict[str, str]]) -> None:
        """Write the whole file atomically, so that a kill does not lose rows."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_text(Path(self.metrics_file_path), text.getvalue())


def _rows_before(path: Path, step: int) -> list[dict[str, str]]:
    """Rows of earlier steps, without empty cells."""
    rows = []
    for row in csv_rows(path):
        if int(row["step"]) < step:
            rows.append({key: value for key, value in row.items() if value != ""})
    return rows


def log_before_saving(trainer: Trainer, *, is_epoch_end: bool) -> None:
    """Write the row of a step or epoch to `metrics.csv` before a checkpoint counts it as logged.

    Lightning writes the row only after the checkpoint.

    Args:
        trainer: the trainer.
        is_epoch_end: True = write the row of the epoch; False = the row of the step, if it is due.
    """
    connector = trainer._logger_connector
    loop = trainer.fit_loop.epoch_loop
    loggers = trainer.loggers
    trainer.loggers = [logger for logger in loggers if isinstance(logger, CSVLog)]
    # Lightning, too, logs the row of an epoch with the number of the epoch's last step.
    num_steps_back = 1 if is_epoch_end else 0
    loop._batches_that_stepped -= num_steps_back
    if is_epoch_end or connector.should_update_logs:
        connector.log_metrics(connector.metrics["log"])
    loop._batches_that_stepped += num_steps_back
    trainer.loggers = loggers


@contextlib.contextmanager
def end_wandb_runs(loggers: Iterable[Logger]) -> Generator[None]:
    """End W&B's runs after this block, as failed if the block raises anything but `Preempted`.

    W&B itself would end them with the process, which in a multirun is long after the job.
    """
    try:
        yield
    finally:
        has_failed = sys.exc_info()[0] not in {None, Preempted}
        for logger in loggers:
            # The property `experiment` would start a run if nothing was logged yet.
            if isinstance(logger, WandbLogger) and logger._experiment is not None:
                logger._experiment.finish(exit_code=int(has_failed))
