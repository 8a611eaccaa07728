"""`metrics.csv` of a run that may be killed and resumed; and the end of what Lightning's loggers leave open."""

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

# W&B and MLflow report to their makers unless these say otherwise, and MLflow lists the tables that it makes.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(_name, _value)


class CSVLog(CSVLogger):
    """Lightning's logger; every row is in the file at once, and a run that is resumed goes on in the file.

    Attributes:
        resumed_at: optimizer steps of the checkpoint that the run is resumed from: rows of later steps are dropped, as they come again.
            0 = a new run, which replaces the file.
    """

    resumed_at: int = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self.resumed_at)
        return self._experiment  # type: ignore[return-value]


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, resumed_at: int) -> None:
        super().__init__(log_dir)
        self._last = ""
        path = Path(self.metrics_file_path)
        try:
            there = csv_rows(path) if resumed_at and path.is_file() else []
            rows = [
                {key: value for key, value in row.items() if value != ""}
                for row in there
                if int(row["step"]) < resumed_at
            ]
            self.metrics_keys = sorted(set().union(*rows))
        except Exception as error:
            raise UsageError(
                f"{path}: must be the table that this run wrote; without it the run resumes, too ({error})"
            ) from error
        if rows:
            self._write(rows)
        else:
            path.unlink(missing_ok=True)

    def _check_log_dir_exists(self) -> None:
        """Lightning would delete the rows of a run that is resumed."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Write a row; one that comes twice running (`log_before_saving`) is written once."""
        if (row := f"{step} {metrics_dict}") != self._last:
            super().log_metrics(metrics_dict, step)
            self.save()
        self._last = row

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:  # noqa: ARG002  (Lightning's signature)
        self._write(csv_rows(Path(self.metrics_file_path)))

    def _write(self, rows: list[dict[str, str]]) -> None:
        """The whole file, at once: a kill costs no row."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_text(Path(self.metrics_file_path), text.getvalue())


def log_before_saving(trainer: Trainer, *, epoch: bool) -> None:
    """Put the row of a step, or of an epoch, into `metrics.csv` before the checkpoint that counts it as logged: Lightning does so later."""
    connector, loop, loggers = (
        trainer._logger_connector,
        trainer.fit_loop.epoch_loop,
        trainer.loggers,
    )
    trainer.loggers = [one for one in loggers if isinstance(one, CSVLog)]
    loop._batches_that_stepped -= epoch  # as Lightning does for the row of an epoch
    if epoch or connector.should_update_logs:
        connector.log_metrics(connector.metrics["log"])
    loop._batches_that_stepped += epoch
    trainer.loggers = loggers


@contextlib.contextmanager
def closing(loggers: Iterable[Logger]) -> Generator[None]:
    """End the runs that W&B leaves open until the process ends, in a multirun long after the job; they failed if the block raises."""
    try:
        yield
    finally:
        failed = sys.exc_info()[0] not in {None, Preempted}
        for logger in loggers:
            # Asking for `experiment` would begin a run where nothing was logged yet.
            if isinstance(logger, WandbLogger) and logger._experiment is not None:
                logger._experiment.finish(exit_code=int(failed))
